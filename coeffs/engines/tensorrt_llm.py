"""TensorRT-LLM: ``cache_config`` of ``VisualGenArgs``, in YAML.

Any number of coefficients, highest power first, ``coefficients_2`` for the low-noise expert; the predicted change is
taken absolute and the accumulator capped at twice the threshold. ``use_ret_steps`` computes the first five steps,
without it the first and the last compute. Unknown keys are refused.
"""

from coeffs.engines.setting import (
    Carried,
    Request,
    comment,
    flow,
    number,
    number_list,
    setting,
    window,
)
from coeffs.engines.text import read_yaml
from coeffs.entry.strict_yaml import format_float
from coeffs.errors import EngineError

SIGN_RULE = "abs"
MODES = {"false": (1, 1), "true": (5, 0)}
KEYS = {"transformer": "coefficients", "transformer_2": "coefficients_2"}


def write(request: Request) -> str:
    found = setting(request, "tensorrt-llm", sign_rule=SIGN_RULE, experts=2)
    if unknown := set(found.fits) - set(KEYS):
        raise EngineError(
            f"{request.entry.label}: expert {', '.join(sorted(unknown))}, tensorrt-llm knows {', '.join(KEYS)}"
        )
    mode, said = window(request.entry, MODES, "tensorrt-llm")
    lists = "".join(
        f"  {KEYS[name]}: {flow(fit.coefficients_high_to_low)}\n"
        for name, fit in found.fits.items()
    )
    return (
        f"{comment([*found.notes, *said])}cache_config:\n  cache_backend: teacache\n"
        f"  teacache_thresh: {format_float(found.threshold)}\n  use_ret_steps: {mode}\n{lists}"
    )


def read(text: str) -> Carried:
    form = read_yaml(text, required={"cache_config"})["cache_config"]
    allowed = {"cache_backend", "teacache_thresh", "use_ret_steps", *KEYS.values()}
    if not isinstance(form, dict) or form.get("cache_backend") != "teacache" or set(form) - allowed:
        raise EngineError(
            f"cache_config: expected cache_backend: teacache with {', '.join(sorted(allowed))}"
        )
    start, end = MODES["true" if form.get("use_ret_steps") else "false"]
    return Carried(
        coefficients={
            name: number_list(form[key], key) for name, key in KEYS.items() if key in form
        },
        threshold=number(form.get("teacache_thresh"), "teacache_thresh"),
        start=start,
        end=end,
        sign_rule=SIGN_RULE,
    )
