"""diffusers: one ``MagCacheConfig`` per denoiser, from the entry's magnitude ratios, in Python.

One list of ratios for all guidance branches, index = step, interpolated to the number of steps that runs. MagCache has
a threshold of its own kind; TeaCache's is not carried over.
"""

from coeffs.engines.setting import Carried, Request, comment, described, flow, number_list
from coeffs.engines.text import read_calls
from coeffs.entry.schema import Entry
from coeffs.errors import EngineError

SUFFIX = "_mag_cache"


def write(request: Request) -> str:
    entry = request.entry
    notes, lines = [described(entry)], []
    for name in entry.experts:
        branch, ratios = _ratios(entry, name)
        notes += [f"{name}: the ratios of branch {branch}, used for every branch"]
        cap = "" if entry.max_skips is None else f"max_skip_steps={entry.max_skips}, "
        lines.append(
            f"{name}{SUFFIX} = MagCacheConfig(num_inference_steps={len(ratios)}, {cap}mag_ratios={flow(ratios)})\n"
        )
    notes.append(
        "threshold and retention_ratio stay at diffusers' own defaults; TeaCache thresholds mean something else"
    )
    return comment(notes) + "".join(lines)


def _ratios(entry: Entry, expert: str) -> tuple[str, tuple[float, ...]]:
    found = entry.experts[expert].mag_ratios
    if not found:
        raise EngineError(
            f"{entry.label} has no mag_ratios for {expert}: record it again, they come with the pairs"
        )
    recommended = entry.experts[expert].recommended
    order = [recommended, "cond", *found]
    branch = next(name for name in order if name in found)
    return branch, found[branch]


def read(text: str) -> Carried:
    ratios, caps = {}, set()
    for name, form in read_calls(text, "MagCacheConfig"):
        expert = (name or "transformer").removesuffix(SUFFIX)
        ratios[expert] = number_list(form.get("mag_ratios"), "mag_ratios")
        caps.add(form.get("max_skip_steps"))
    cap = caps.pop() if len(caps) == 1 else None
    if cap is not None and (isinstance(cap, bool) or not isinstance(cap, int)):
        raise EngineError(f"max_skip_steps {str(cap)[:40]!r}: expected a whole number")
    return Carried(mag_ratios=ratios, max_skips=cap)
