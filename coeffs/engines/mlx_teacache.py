"""mlx-teacache: the keyword arguments of ``apply_teacache``, in Python.

Exactly five coefficients, highest power first; negative predictions count as 0; the threshold is at most 1. The first
and last steps always compute as given here. Coefficients of one's own are used without a fitted range.
"""

from coeffs.engines.setting import Carried, Request, edges, setting
from coeffs.engines.text import call_text, read_calls, value_of
from coeffs.entry.fields import Count, Numbers
from coeffs.errors import EngineError


def write(request: Request) -> str:
    chosen = setting(request)
    first, last = edges(request.entry)
    if chosen.threshold > 1:
        raise EngineError(f"threshold {chosen.threshold:g}: mlx-teacache takes at most 1")
    arguments = {
        "rel_l1_thresh": chosen.threshold,
        "coefficients": chosen.only,
        "skip_first_n_steps": first,
        "skip_last_n_steps": last,
    }
    return call_text(request.notes, "apply_teacache", arguments, first="    model,\n")


def read(text: str) -> Carried:
    ((_, given), *_) = read_calls(text, "apply_teacache")
    form = {"skip_first_n_steps": 1, "skip_last_n_steps": 1} | given
    return Carried(
        coefficients={"transformer": value_of(form, "coefficients", Numbers)},
        threshold=value_of(form, "rel_l1_thresh"),
        start=value_of(form, "skip_first_n_steps", Count),
        end=value_of(form, "skip_last_n_steps", Count),
        sign_rule="clamp",
    )
