"""vLLM-Omni: the JSON object of ``cache_config`` (``--cache-backend tea_cache --cache-config '...'``).

Exactly five coefficients, highest power first; the predicted change is taken absolute; the first step always computes.
Keys it does not know are kept aside, so that the comment can travel inside the object.
"""

import json

from coeffs.engines.setting import (
    Carried,
    Request,
    number,
    number_list,
    padded,
    setting,
    stripped,
    window,
)
from coeffs.engines.text import read_json

SIGN_RULE = "abs"
COUNT = 5


def write(request: Request) -> str:
    found = setting(request, "vllm-omni", sign_rule=SIGN_RULE, max_degree=COUNT - 1)
    _, said = window(request.entry, {"": (1, 0)}, "vllm-omni")
    (fit,) = found.fits.values()
    form = {
        "_comment": "; ".join([*found.notes, *said]),
        "rel_l1_thresh": found.threshold,
        "coefficients": padded(fit.coefficients_high_to_low, COUNT),
    }
    return json.dumps(form) + "\n"


def read(text: str) -> Carried:
    form = read_json(
        text, required={"coefficients"}, known={"_comment", "rel_l1_thresh", "coefficients"}
    )
    coefficients = number_list(form["coefficients"], "coefficients")
    threshold = form.get("rel_l1_thresh")
    return Carried(
        coefficients={"transformer": stripped(coefficients)},
        threshold=None if threshold is None else number(threshold, "rel_l1_thresh"),
        sign_rule=SIGN_RULE,
    )
