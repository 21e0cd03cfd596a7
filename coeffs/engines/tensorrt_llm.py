"""TensorRT-LLM: ``cache_config`` of ``VisualGenArgs``, in YAML.

Any number of coefficients, highest power first, ``coefficients_2`` for the low-noise expert; the predicted change is
taken absolute and the accumulator capped at twice the threshold. ``use_ret_steps`` computes the first five steps,
without it the first and the last compute; for Wan it also selects the projected time embedding.
"""

from coeffs.engines.releases import projected, releases
from coeffs.engines.setting import Carried, Request, setting, window
from coeffs.engines.text import Form, read_section, value_of, yaml_text
from coeffs.entry.fields import Numbers
from coeffs.errors import EngineError

ENGINE = "tensorrt-llm"
WAN = "WanTransformer3DModel"
KEYS = {"transformer": "coefficients", "transformer_2": "coefficients_2"}


def write(request: Request) -> str:
    entry = request.entry
    chosen = setting(request)
    if unknown := set(chosen.coefficients) - set(KEYS):
        raise EngineError(
            f"{entry.label}: expert {', '.join(sorted(unknown))}, tensorrt-llm knows {', '.join(KEYS)}"
        )
    of_signal = "true" if projected(entry) else "false"
    mode = window(request, [of_signal] if entry.transformer_class == WAN else None)
    form: Form = {
        "cache_backend": "teacache",
        "teacache_thresh": chosen.threshold,
        "use_ret_steps": mode == "true",
    }
    for name, coefficients in chosen.coefficients.items():
        form[KEYS[name]] = coefficients
    return yaml_text(request.notes, "cache_config", form)


def read(text: str) -> Carried:
    form = read_section(text, "cache_config", ENGINE)
    if form.get("cache_backend") != "teacache":
        raise EngineError("cache_config: expected cache_backend: teacache")
    start, end = releases()[ENGINE].windows["true" if form.get("use_ret_steps") else "false"]
    return Carried(
        coefficients={
            name: value_of(form, key, Numbers) for name, key in KEYS.items() if key in form
        },
        threshold=value_of(form, "teacache_thresh"),
        start=start,
        end=end,
        sign_rule="abs",
    )
