"""diffusers' MagCache: one ``MagCacheConfig`` per denoiser, in Python.

One list of ratios for all guidance branches, index = step, interpolated to the number of steps that runs. MagCache has
a threshold of its own kind; TeaCache's is not carried over. A plan is written as crafted ratios.
"""

from coeffs.engines.plans import (
    crafted,
    is_crafted,
    planned,
    recorded_ratios,
    runs,
    schedule_of,
    wants_plan,
)
from coeffs.engines.setting import Carried, Request, checked
from coeffs.engines.text import cap, comment, number_list, read_calls

ENGINE = "diffusers-magcache"
SUFFIX = "_mag_cache"


def write(request: Request) -> str:
    if wants_plan(request):
        plan, notes = planned(request, ENGINE)
        longest = max(runs(plan.schedule, "S"))
        settings = f"max_skip_steps={longest}, retention_ratio=0.0, "
        return comment(notes) + _line("transformer", settings, crafted(plan))
    entry = request.entry
    _, notes = checked(request, ENGINE)
    settings = "" if entry.max_skips is None else f"max_skip_steps={entry.max_skips}, "
    lines = []
    for name in entry.experts:
        branch, ratios = next(iter(recorded_ratios(entry, name).items()))
        notes.append(f"{name}: the ratios of branch {branch}, used for every branch")
        lines.append(_line(name, settings, list(ratios)))
    notes.append(
        "threshold and retention_ratio stay at diffusers' own defaults; TeaCache thresholds mean something else"
    )
    return comment(notes) + "".join(lines)


def _line(expert: str, settings: str, ratios: list[float]) -> str:
    arguments = f"num_inference_steps={len(ratios)}, {settings}mag_ratios={ratios}"
    return f"{expert}{SUFFIX} = MagCacheConfig({arguments})\n"


def read(text: str) -> Carried:
    ratios, caps = {}, set()
    for name, form in read_calls(text, "MagCacheConfig"):
        expert = (name or "transformer").removesuffix(SUFFIX)
        ratios[expert] = {"pooled": number_list(form.get("mag_ratios"), "mag_ratios")}
        caps.add(cap(form.get("max_skip_steps")))
    first = next(iter(ratios.values()))["pooled"]
    if len(ratios) == 1 and is_crafted(first):
        return Carried(schedule=schedule_of(first))
    return Carried(mag_ratios=ratios, max_skips=caps.pop() if len(caps) == 1 else None)
