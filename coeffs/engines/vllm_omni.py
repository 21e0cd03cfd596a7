"""vLLM-Omni's TeaCache: the JSON object of ``--cache-config`` (``--cache-backend tea_cache``).

Exactly five coefficients, highest power first; the predicted change is taken absolute; the first step always computes.
Keys it does not know are kept aside, so that the comment can travel inside the object.
"""

import json

from coeffs.engines.releases import releases
from coeffs.engines.setting import Carried, Request, padded, setting, stripped, window
from coeffs.engines.text import number, number_list, read_json

ENGINE = "vllm-omni"


def write(request: Request) -> str:
    chosen = setting(request, ENGINE)
    _, said = window(request.entry, ENGINE)
    form = {
        "_comment": "; ".join([*chosen.notes, *said]),
        "rel_l1_thresh": chosen.threshold,
        "coefficients": padded(chosen.only, 5),
    }
    return json.dumps(form) + "\n"


def read(text: str) -> Carried:
    form = read_json(text, required={"coefficients"}, known=releases()[ENGINE].keys)
    threshold = form.get("rel_l1_thresh")
    return Carried(
        coefficients={"transformer": stripped(number_list(form["coefficients"], "coefficients"))},
        threshold=None if threshold is None else number(threshold, "rel_l1_thresh"),
        sign_rule="abs",
    )
