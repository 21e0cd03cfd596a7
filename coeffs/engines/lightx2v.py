"""LightX2V's TeaCache: keys of a model's configuration, in JSON.

Wan compares the time embedding and takes a pair of lists, ``[projected (use_ret_steps), plain]``, of which
``use_ret_steps`` picks one; HunyuanVideo-1.5 compares the modulated input and takes one list. Negative predictions are
kept. Keys that it does not know are carried along, so the comment can travel inside.
"""

from coeffs.engines.releases import projected
from coeffs.engines.setting import Carried, Request, setting, window
from coeffs.engines.text import Form, json_text, read_json, value_of
from coeffs.entry.fields import Numbers
from coeffs.errors import EngineError

WAN = "WanTransformer3DModel"


def write(request: Request) -> str:
    chosen = setting(request)
    wan = request.entry.transformer_class == WAN
    ret_steps = wan and projected(request.entry)
    window(request, ["true" if ret_steps else "false"])
    coefficients = chosen.only
    form: Form = {"feature_caching": "Tea", "coefficients": coefficients}
    if wan:
        form["coefficients"] = [coefficients, []] if ret_steps else [[], coefficients]
        form["use_ret_steps"] = ret_steps
    form["teacache_thresh"] = chosen.threshold
    return json_text(request.notes, form, indent=4)


def read(text: str) -> Carried:
    form = read_json(text)
    if form.get("feature_caching") != "Tea":
        raise EngineError("feature_caching: expected Tea")
    ret_steps = value_of(form, "use_ret_steps", bool | None)
    wan = ret_steps is not None  # which of the two lists
    if wan:
        form["coefficients"] = value_of(form, "coefficients", tuple[Numbers, Numbers])[
            not ret_steps
        ]
    return Carried(
        coefficients={"transformer": value_of(form, "coefficients", Numbers)},
        threshold=value_of(form, "teacache_thresh"),
        start=5 if ret_steps else 1,
        end=0 if ret_steps else 1,
        sign_rule="signed",
        signal="time_embedding" if wan else "modulated_input",
    )
