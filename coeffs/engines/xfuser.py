"""xfuser: options of its command line with ``--cache_config``, a JSON object, from a plan.

It overrides the model's preset, whose own policy of masks is switched off. TaylorSeer is on or off, of order 1.
"""

import json

from coeffs.engines.plans import ONE_BLOCK, guidance, planned, read_mask
from coeffs.engines.setting import Carried, Request
from coeffs.engines.text import Form, command_line, read_option

OPTION = "--cache_config"


def write(request: Request) -> str:
    plan = planned(request)
    form: Form = {
        **ONE_BLOCK,
        "scm_policy": None,
        "enable_taylorseer": plan.order > 0,
        "steps_computation_mask": plan.mask,
        "steps_computation_policy": "static",
        **guidance(request),
    }
    options = {
        "--num_inference_steps": str(len(plan.schedule)),
        "--cache_method": "dbcache",
        OPTION: json.dumps(form),
    }
    return command_line(request.notes, options)


def read(text: str) -> Carried:
    return read_mask(read_option(text, OPTION, "xfuser"))
