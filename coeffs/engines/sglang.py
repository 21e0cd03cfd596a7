"""SGLang: ``TeaCacheParams`` of the sampling parameters, in Python.

Any number of coefficients, highest power first; negative predictions are kept. ``start_skipping`` and ``end_skipping``
are step indices (negative from the end) or fractions of the schedule. Two-expert models take ``expert_coefficients``
under ``high`` and ``low``, which diffusers calls ``transformer`` and ``transformer_2``.
"""

from coeffs.engines.setting import Carried, Request, comment, flow, number, number_list, setting
from coeffs.engines.text import read_calls
from coeffs.errors import EngineError

SIGN_RULE = "signed"
EXPERTS = {"transformer": "high", "transformer_2": "low"}


def write(request: Request) -> str:
    entry = request.entry
    found = setting(request, "sglang", sign_rule=SIGN_RULE, experts=2)
    lists = {name: flow(fit.coefficients_high_to_low) for name, fit in found.fits.items()}
    lines = [
        f"teacache_thresh={found.threshold!r}",
        f"start_skipping={1 if entry.start is None else entry.start!r}",
        f"end_skipping={_end_skipping(entry.end)}",
    ]
    if entry.signal == "time_embedding":
        lines.append(f"use_ret_steps={'projected' in (entry.signal_note or '')}")
    if len(lists) == 1:
        lines += [f"coefficients={coefficients}" for coefficients in lists.values()]
    else:
        unknown = set(lists) - set(EXPERTS)
        if unknown:
            raise EngineError(
                f"{entry.label}: expert {', '.join(sorted(unknown))}, sglang knows {', '.join(EXPERTS)}"
            )
        inner = ", ".join(
            f'"{EXPERTS[name]}": {coefficients}' for name, coefficients in lists.items()
        )
        lines += [f"coefficients={lists['transformer']}", f"expert_coefficients={{{inner}}}"]
    body = "".join(f"    {line},\n" for line in lines)
    return f"{comment(found.notes)}TeaCacheParams(\n{body})\n"


def _end_skipping(end: int | float | None) -> str:
    """Index after which every step computes: counted from the end, or the whole schedule for 0."""
    if isinstance(end, float) and end > 0:
        return repr(1.0 - end)
    return "1.0" if not end else repr(-end)


def read(text: str) -> Carried:
    ((_, form), *others) = read_calls(text, "TeaCacheParams")
    if others:
        raise EngineError(f"{len(others) + 1} calls of TeaCacheParams: expected one")
    experts = form.get("expert_coefficients")
    if isinstance(experts, dict):
        names = {high_or_low: name for name, high_or_low in EXPERTS.items()}
        if set(experts) != set(names):
            raise EngineError("expert_coefficients: expected a list for high and one for low")
        coefficients = {names[key]: number_list(value, key) for key, value in experts.items()}
    else:
        coefficients = {"transformer": number_list(form.get("coefficients"), "coefficients")}
    signal = None if form.get("use_ret_steps") is None else "time_embedding"
    return Carried(
        coefficients=coefficients,
        threshold=number(form.get("teacache_thresh"), "teacache_thresh"),
        start=_edge(form.get("start_skipping", 5)),
        end=_end(form.get("end_skipping", -1)),
        sign_rule=SIGN_RULE,
        signal=signal,
    )


def _edge(value: object) -> int | float:
    number(value, "start_skipping")
    if value < 0:
        raise EngineError(
            f"start_skipping {value}: counted from the end, expected it from the start"
        )
    return value


def _end(value: object) -> int | float:
    number(value, "end_skipping")
    if isinstance(value, float):
        return round(1.0 - value, 12) if value < 1 else 0
    if value >= 0:
        raise EngineError(
            f"end_skipping {value}: an index from the start; expected it from the end, e.g. -1"
        )
    return -value
