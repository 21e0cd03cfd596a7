"""LightX2V: the TeaCache keys of a model's configuration, in JSON.

Wan compares the time embedding and takes a pair of lists, ``[projected (use_ret_steps), plain]``, of which
``use_ret_steps`` picks one; HunyuanVideo-1.5 compares the modulated input and takes one list. Negative predictions are
kept. Keys that it does not know are carried along, so the comment can travel inside.
"""

import json

from coeffs.engines.setting import Carried, Request, number, number_list, setting, window
from coeffs.engines.text import read_json
from coeffs.errors import EngineError

SIGN_RULE = "signed"
WAN, HUNYUAN = "WanTransformer3DModel", "HunyuanVideo15Transformer3DModel"
SIGNALS = {WAN: "time_embedding", HUNYUAN: "modulated_input"}


def write(request: Request) -> str:
    entry = request.entry
    signal = SIGNALS.get(entry.transformer_class or "")
    if signal is None:
        raise EngineError(
            f"{entry.label} is for {entry.transformer_class}: lightx2v has TeaCache for {' and '.join(SIGNALS)} only"
        )
    if entry.signal != signal:
        raise EngineError(
            f"{entry.label} was fitted on the {entry.signal}, lightx2v compares the {signal} there: fit the run again "
            f"with `calibrate fit RUN --signal {signal}`"
        )
    found = setting(request, "lightx2v", sign_rule=SIGN_RULE)
    (fit,) = found.fits.values()
    coefficients = list(fit.coefficients_high_to_low)
    form: dict = {"feature_caching": "Tea"}
    if entry.transformer_class == WAN:
        projected = "projected" in (entry.signal_note or "")
        _, said = window(entry, {"": (5, 0) if projected else (1, 1)}, "lightx2v")
        form |= {
            "coefficients": [coefficients, []] if projected else [[], coefficients],
            "use_ret_steps": projected,
        }
    else:
        _, said = window(entry, {"": (1, 1)}, "lightx2v")
        form |= {"coefficients": coefficients}
    form["teacache_thresh"] = found.threshold
    return json.dumps({"_comment": "; ".join([*found.notes, *said]), **form}, indent=4) + "\n"


def read(text: str) -> Carried:
    form = read_json(text, required={"feature_caching", "coefficients", "teacache_thresh"})
    if form["feature_caching"] != "Tea":
        raise EngineError(f"feature_caching {str(form['feature_caching'])[:40]!r}: expected Tea")
    coefficients, projected = form["coefficients"], form.get("use_ret_steps")
    wan = isinstance(coefficients, list) and coefficients and isinstance(coefficients[0], list)
    if wan:
        if len(coefficients) != 2 or not isinstance(projected, bool):
            raise EngineError("coefficients: expected [projected, plain] and use_ret_steps")
        coefficients = coefficients[0 if projected else 1]
    return Carried(
        coefficients={"transformer": number_list(coefficients, "coefficients")},
        threshold=number(form["teacache_thresh"], "teacache_thresh"),
        start=5 if wan and projected else 1,
        end=0 if wan and projected else 1,
        sign_rule=SIGN_RULE,
        signal="time_embedding" if wan else "modulated_input",
    )
