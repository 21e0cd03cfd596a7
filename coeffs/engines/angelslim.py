"""AngelSlim: ``no_cache_steps`` of its cache helpers, in YAML, from a plan.

The helper counts the steps that its user sets and computes those in the list. ``DeepCacheHelper`` replays the blocks'
last output, ``TaylorCacheHelper`` extrapolates it.
"""

from typing import Annotated

from coeffs.engines.plans import planned
from coeffs.engines.setting import Carried, Request
from coeffs.engines.text import read_section, value_of, yaml_text
from coeffs.entry.fields import MAX_STEPS, Limits, Steps

Index = Annotated[int, Limits(0, MAX_STEPS)]


def write(request: Request) -> str:
    plan = planned(request)
    request.notes.append(
        "hand the list to the helper as a set, and its cur_timestep every step's index"
    )
    computed = [step for step, computes in enumerate(plan.mask) if computes]
    form = {"no_cache_steps": computed, "num_steps": len(plan.schedule)}
    return yaml_text(request.notes, "cache", form)


def read(text: str) -> Carried:
    form = read_section(text, "cache")
    computed = value_of(form, "no_cache_steps", tuple[Index, ...])
    steps = range(value_of(form, "num_steps", Steps))
    return Carried(schedule="".join("SC"[step in computed] for step in steps))
