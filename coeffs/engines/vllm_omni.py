"""vLLM-Omni's TeaCache: the JSON object of ``--cache-config`` (``--cache-backend tea_cache``).

Exactly five coefficients, highest power first; the predicted change is taken absolute; the first step always computes.
Keys it does not know are kept aside, so that the comment can travel inside the object.
"""

from coeffs.engines.setting import Carried, Request, setting, window
from coeffs.engines.text import json_text, read_json, value_of
from coeffs.entry.fields import Numbers


def write(request: Request) -> str:
    chosen = setting(request)
    window(request)
    return json_text(
        request.notes, {"rel_l1_thresh": chosen.threshold, "coefficients": chosen.only}
    )


def read(text: str) -> Carried:
    form = read_json(text, "vllm-omni")
    return Carried(
        coefficients={"transformer": value_of(form, "coefficients", Numbers)},
        threshold=value_of(form, "rel_l1_thresh", float | None),
        sign_rule="abs",
    )
