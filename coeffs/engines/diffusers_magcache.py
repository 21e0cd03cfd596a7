"""diffusers' MagCache: one ``MagCacheConfig`` per denoiser, in Python.

One list of ratios for all guidance branches, index = step, interpolated to the number of steps that runs. MagCache has
a threshold of its own kind; TeaCache's is not carried over. A plan is written as crafted ratios.
"""

from coeffs.engines.plans import mag_cache, read_ratios
from coeffs.engines.setting import Carried, Request
from coeffs.engines.text import comment, read_calls, value_of
from coeffs.entry.fields import Numbers, Steps

SUFFIX = "_mag_cache"


def write(request: Request) -> str:
    form = mag_cache(request)
    settings = "" if form.cap is None else f"max_skip_steps={form.cap}, "
    if form.crafted:
        settings += "retention_ratio=0.0, "
    lines = []
    for name, branches in form.experts.items():
        branch, ratios = next(iter(branches.items()))
        if not form.crafted:
            request.notes.append(
                f"{name}: the ratios of branch {branch}, used for every branch"
            )
        lines.append(
            f"{name}{SUFFIX} = MagCacheConfig(num_inference_steps={len(ratios)}, {settings}mag_ratios={[*ratios]})\n"
        )
    if not form.crafted:
        request.notes.append(
            "threshold and retention_ratio stay at diffusers' own defaults; TeaCache thresholds mean something else"
        )
    return comment(request.notes) + "".join(lines)


def read(text: str) -> Carried:
    experts, caps = {}, set()
    for name, form in read_calls(text, "MagCacheConfig"):
        expert = (name or "transformer").removesuffix(SUFFIX)
        experts[expert] = {"pooled": value_of(form, "mag_ratios", Numbers)}
        caps.add(value_of(form, "max_skip_steps", Steps | None))
    return read_ratios(experts, caps.pop() if len(caps) == 1 else None)
