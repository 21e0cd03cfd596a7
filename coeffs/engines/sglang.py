"""SGLang's TeaCache: ``TeaCacheParams`` of the sampling parameters, in Python; Wan only.

Any number of coefficients, highest power first; negative predictions are kept. ``start_skipping`` and ``end_skipping``
are step indices (negative from the end) or fractions of the schedule. ``use_ret_steps`` picks the projected time
embedding.
"""

from coeffs.engines.releases import projected
from coeffs.engines.setting import Carried, Request, setting
from coeffs.engines.text import call_text, read_calls, value_of
from coeffs.entry.fields import Numbers
from coeffs.errors import EngineError


def write(request: Request) -> str:
    entry = request.entry
    chosen = setting(request)
    request.notes.append("takes effect with enable_teacache=True beside it")
    # The index after which every step computes: counted from the end, or the whole schedule for 0.
    end = entry.end or 0
    arguments = {
        "teacache_thresh": chosen.threshold,
        "start_skipping": 1 if entry.start is None else entry.start,
        "end_skipping": -end if end and isinstance(end, int) else 1.0 - end,
        "use_ret_steps": projected(entry),
        "coefficients": chosen.only,
    }
    return call_text(request.notes, "TeaCacheParams", arguments)


def read(text: str) -> Carried:
    ((_, given), *others) = read_calls(text, "TeaCacheParams")
    if others:
        raise EngineError(f"{len(others) + 1} calls of TeaCacheParams: expected one")
    form = {"start_skipping": 5, "end_skipping": -1} | given
    start, end = (
        value_of(form, key, int | float) for key in ("start_skipping", "end_skipping")
    )
    if start < 0 or (isinstance(end, int) and end >= 0):
        raise EngineError(
            f"start_skipping {start}, end_skipping {end}: expected the start counted from the start and the end "
            "from the end, e.g. 5 and -1"
        )
    return Carried(
        coefficients={"transformer": value_of(form, "coefficients", Numbers)},
        threshold=value_of(form, "teacache_thresh"),
        start=start,
        end=-end if isinstance(end, int) else round(max(0.0, 1.0 - end), 12) or 0,
        sign_rule="signed",
        signal=None if form.get("use_ret_steps") is None else "time_embedding",
    )
