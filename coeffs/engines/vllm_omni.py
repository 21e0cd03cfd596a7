"""vLLM-Omni's TeaCache: the JSON object of ``--cache-config`` (``--cache-backend tea_cache``).

Exactly five coefficients, highest power first; the predicted change is taken absolute; the first step always computes.
Keys it does not know are kept aside, so that the comment can travel inside the object.
"""

from coeffs.engines.setting import Carried, Request, padded, setting, window
from coeffs.engines.text import Numbers, json_text, read_json, value_of


def write(request: Request) -> str:
    chosen = setting(request)
    _, said = window(request)
    form = {"rel_l1_thresh": chosen.threshold, "coefficients": padded(chosen.only, 5)}
    return json_text([*chosen.notes, *said], form)


def read(text: str) -> Carried:
    form = read_json(text, "vllm-omni")
    return Carried(
        coefficients={"transformer": value_of(form, "coefficients", Numbers)},
        threshold=value_of(form, "rel_l1_thresh", float | None),
        sign_rule="abs",
    )
