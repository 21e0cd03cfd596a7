"""SGLang's TeaCache: ``TeaCacheParams`` of the sampling parameters, in Python; Wan only.

Any number of coefficients, highest power first; negative predictions are kept. ``start_skipping`` and ``end_skipping``
are step indices (negative from the end) or fractions of the schedule. ``use_ret_steps`` picks the projected time
embedding.
"""

from coeffs.engines.releases import projected
from coeffs.engines.setting import Carried, Request, setting
from coeffs.engines.text import comment, number, number_list, read_calls
from coeffs.errors import EngineError

ENGINE = "sglang"


def write(request: Request) -> str:
    entry = request.entry
    chosen = setting(request, ENGINE)
    notes = [*chosen.notes, "takes effect with enable_teacache=True beside it"]
    arguments = {
        "teacache_thresh": chosen.threshold,
        "start_skipping": 1 if entry.start is None else entry.start,
        "end_skipping": _end_skipping(entry.end),
        "use_ret_steps": projected(entry),
        "coefficients": chosen.only,
    }
    body = "".join(f"    {name}={value!r},\n" for name, value in arguments.items())
    return f"{comment(notes)}TeaCacheParams(\n{body})\n"


def _end_skipping(end: int | float | None) -> int | float:
    """Index after which every step computes: counted from the end, or the whole schedule for 0."""
    if isinstance(end, float):
        return 1.0 - end
    return -end if end else 1.0


def read(text: str) -> Carried:
    ((_, form), *others) = read_calls(text, "TeaCacheParams")
    if others:
        raise EngineError(f"{len(others) + 1} calls of TeaCacheParams: expected one")
    signal = None if form.get("use_ret_steps") is None else "time_embedding"
    return Carried(
        coefficients={"transformer": number_list(form.get("coefficients"), "coefficients")},
        threshold=number(form.get("teacache_thresh"), "teacache_thresh"),
        start=_start(form.get("start_skipping", 5)),
        end=_end(form.get("end_skipping", -1)),
        sign_rule="signed",
        signal=signal,
    )


def _start(given: object) -> int | float:
    value = number(given, "start_skipping")
    if value < 0:
        raise EngineError(
            f"start_skipping {value}: counted from the end, expected it from the start"
        )
    return value if isinstance(given, float) else int(value)


def _end(given: object) -> int | float:
    value = number(given, "end_skipping")
    if isinstance(given, float):
        return round(1.0 - value, 12) if value < 1 else 0
    if value >= 0:
        raise EngineError(
            f"end_skipping {value:g}: an index from the start; expected it from the end, e.g. -1"
        )
    return -int(value)
