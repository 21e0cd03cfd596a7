"""mlx-teacache: the keyword arguments of ``apply_teacache``, in Python.

Exactly five coefficients, highest power first; negative predictions count as 0; the threshold is at most 1. The first
and last steps always compute as given here. Coefficients of one's own are used without a fitted range.
"""

from coeffs.engines.setting import Carried, Request, padded, setting, steps, stripped
from coeffs.engines.text import comment, number, number_list, read_calls
from coeffs.errors import EngineError

ENGINE = "mlx-teacache"


def write(request: Request) -> str:
    entry = request.entry
    chosen = setting(request, ENGINE)
    if chosen.threshold > 1:
        raise EngineError(f"threshold {chosen.threshold:g}: mlx-teacache takes at most 1")
    arguments = {
        "rel_l1_thresh": chosen.threshold,
        "coefficients": padded(chosen.only, 5),
        "skip_first_n_steps": steps(entry, entry.start, 1),
        "skip_last_n_steps": steps(entry, entry.end, 0),
    }
    body = "".join(f"    {name}={value!r},\n" for name, value in arguments.items())
    return f"{comment(chosen.notes)}apply_teacache(\n    model,\n{body})\n"


def read(text: str) -> Carried:
    ((_, form), *_) = read_calls(text, "apply_teacache")
    return Carried(
        coefficients={
            "transformer": stripped(number_list(form.get("coefficients"), "coefficients"))
        },
        threshold=number(form.get("rel_l1_thresh"), "rel_l1_thresh"),
        start=int(number(form.get("skip_first_n_steps", 1), "skip_first_n_steps")),
        end=int(number(form.get("skip_last_n_steps", 1), "skip_last_n_steps")),
        sign_rule="clamp",
    )
