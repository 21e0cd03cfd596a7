"""SGLang's Cache-DiT: options of its command line with ``--cache-dit-params``, a JSON object, from a plan.

Runs of computed and of cached steps alternate, computed first; ``static`` follows them without asking the residual.
Keys it does not know are refused, so the comment stands before the options.
"""

import json

from coeffs.engines.plans import planned, runs, taylor_order
from coeffs.engines.releases import releases
from coeffs.engines.setting import Carried, Request
from coeffs.engines.text import command_line, read_json, read_option
from coeffs.errors import EngineError

ENGINE = "sglang-cache-dit"
OPTION = "--cache-dit-params"


def write(request: Request) -> str:
    plan, notes = planned(request, ENGINE)
    order = taylor_order(plan, releases()[ENGINE])
    form: dict[str, object] = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0}
    if order:
        form |= {"enable_taylorseer": True, "taylorseer_order": order}
    form |= {
        "scm_compute_bins": runs(plan.schedule, "C"),
        "scm_cache_bins": runs(plan.schedule, "S"),
        "scm_policy": "static",
    }
    options = {
        "--num-inference-steps": str(len(plan.schedule)),
        "--enable-cache-dit": "true",
        OPTION: json.dumps(form),
    }
    return command_line(notes, options)


def read(text: str) -> Carried:
    form = read_json(
        read_option(text, OPTION),
        required={"scm_compute_bins", "scm_cache_bins"},
        known=releases()[ENGINE].keys,
    )
    bins = [form["scm_compute_bins"], form["scm_cache_bins"]]
    for lengths in bins:
        if not isinstance(lengths, list) or not all(
            type(length) is int and 0 < length < 10_000 for length in lengths
        ):
            raise EngineError("scm_compute_bins, scm_cache_bins: expected lists of whole numbers")
    computed, cached = bins
    if len(computed) - len(cached) not in (0, 1):
        raise EngineError(
            f"{len(computed)} compute and {len(cached)} cache bins: expected as many, or one more to compute"
        )
    schedule = ""
    for place, length in enumerate(computed):
        schedule += "C" * length + "S" * sum(cached[place : place + 1])
    return Carried(schedule=schedule)
