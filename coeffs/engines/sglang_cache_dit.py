"""SGLang's Cache-DiT: options of its command line with ``--cache-dit-params``, a JSON object, from a plan.

Runs of computed and of cached steps alternate, computed first; ``static`` follows them without asking the residual.
Keys it does not know are refused, so the comment stands before the options.
"""

import json
from itertools import zip_longest

from coeffs.engines.plans import ONE_BLOCK, planned
from coeffs.engines.setting import Carried, Request
from coeffs.engines.text import command_line, read_option, value_of
from coeffs.entry.fields import Steps
from coeffs.errors import EngineError

OPTION = "--cache-dit-params"
BINS = {"C": "scm_compute_bins", "S": "scm_cache_bins"}


def write(request: Request) -> str:
    plan = planned(request)
    form = {**ONE_BLOCK, **plan.taylorseer}
    form |= {name: plan.runs(letter) for letter, name in BINS.items()}
    options = {
        "--num-inference-steps": str(len(plan.schedule)),
        "--enable-cache-dit": "true",
        OPTION: json.dumps(form | {"scm_policy": "static"}),
    }
    return command_line(request.notes, options)


def read(text: str) -> Carried:
    form = read_option(text, OPTION, "sglang-cache-dit")
    computed, cached = (value_of(form, name, tuple[Steps, ...]) for name in BINS.values())
    if len(computed) - len(cached) not in (0, 1):
        raise EngineError(
            f"{len(computed)} compute and {len(cached)} cache bins: expected as many, or one more to compute"
        )
    pairs = zip_longest(computed, cached, fillvalue=0)
    return Carried(schedule="".join("C" * compute + "S" * skip for compute, skip in pairs))
