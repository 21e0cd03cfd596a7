"""LightX2V's TeaCache: keys of a model's configuration, in JSON.

Wan compares the time embedding and takes a pair of lists, ``[projected (use_ret_steps), plain]``, of which
``use_ret_steps`` picks one; HunyuanVideo-1.5 compares the modulated input and takes one list. Negative predictions are
kept. Keys that it does not know are carried along, so the comment can travel inside.
"""

import json

from coeffs.engines.releases import projected
from coeffs.engines.setting import Carried, Request, setting, window
from coeffs.engines.text import number, number_list, read_json
from coeffs.errors import EngineError

ENGINE = "lightx2v"
WAN = "WanTransformer3DModel"


def write(request: Request) -> str:
    entry = request.entry
    chosen = setting(request, ENGINE)
    form: dict[str, object] = {"feature_caching": "Tea"}
    ret_steps = entry.transformer_class == WAN and projected(entry)
    _, said = window(entry, ENGINE, ["true" if ret_steps else "false"])
    if entry.transformer_class == WAN:
        form["coefficients"] = [chosen.only, []] if ret_steps else [[], chosen.only]
        form["use_ret_steps"] = ret_steps
    else:
        form["coefficients"] = chosen.only
    form["teacache_thresh"] = chosen.threshold
    return json.dumps({"_comment": "; ".join([*chosen.notes, *said]), **form}, indent=4) + "\n"


def read(text: str) -> Carried:
    form = read_json(text, required={"feature_caching", "coefficients", "teacache_thresh"})
    if form["feature_caching"] != "Tea":
        raise EngineError(f"feature_caching {str(form['feature_caching'])[:40]!r}: expected Tea")
    coefficients, ret_steps = form["coefficients"], form.get("use_ret_steps")
    wan = isinstance(coefficients, list) and coefficients and isinstance(coefficients[0], list)
    if wan:
        if len(coefficients) != 2 or not isinstance(ret_steps, bool):
            raise EngineError("coefficients: expected [projected, plain] and use_ret_steps")
        coefficients = coefficients[0 if ret_steps else 1]
    early = wan and ret_steps
    return Carried(
        coefficients={"transformer": number_list(coefficients, "coefficients")},
        threshold=number(form["teacache_thresh"], "teacache_thresh"),
        start=5 if early else 1,
        end=0 if early else 1,
        sign_rule="signed",
        signal="time_embedding" if wan else "modulated_input",
    )
