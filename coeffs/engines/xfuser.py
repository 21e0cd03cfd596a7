"""xfuser: options of its command line with ``--cache_config``, a JSON object, from a plan.

It overrides the model's preset, whose own policy of masks is switched off. TaylorSeer is on or off, of order 1.
"""

import json

from coeffs.engines.plans import letters, mask, planned, taylor_order
from coeffs.engines.releases import releases, two_calls
from coeffs.engines.setting import Carried, Request
from coeffs.engines.text import command_line, read_json, read_option

ENGINE = "xfuser"
OPTION = "--cache_config"


def write(request: Request) -> str:
    plan, notes = planned(request, ENGINE)
    form: dict[str, object] = {
        "Fn_compute_blocks": 1,
        "Bn_compute_blocks": 0,
        "scm_policy": None,
        "enable_taylorseer": taylor_order(plan, releases()[ENGINE]) > 0,
        "steps_computation_mask": mask(plan),
        "steps_computation_policy": "static",
    }
    separate = two_calls(request.entry)
    if separate is not None:
        form["enable_separate_cfg"] = separate
    options = {
        "--num_inference_steps": str(len(plan.schedule)),
        "--cache_method": "dbcache",
        OPTION: json.dumps(form),
    }
    return command_line(notes, options)


def read(text: str) -> Carried:
    form = read_json(
        read_option(text, OPTION),
        required={"steps_computation_mask"},
        known=releases()[ENGINE].keys,
    )
    return Carried(schedule=letters(form["steps_computation_mask"], "steps_computation_mask"))
