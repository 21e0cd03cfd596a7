"""AngelSlim: ``no_cache_steps`` of its cache helpers, in YAML, from a plan.

The helper counts the steps that its user sets and computes those in the list. ``DeepCacheHelper`` replays the blocks'
last output, ``TaylorCacheHelper`` extrapolates it.
"""

from coeffs.engines.plans import mask, planned
from coeffs.engines.setting import Carried, Request
from coeffs.engines.text import comment, read_section, yaml_text
from coeffs.errors import EngineError

ENGINE = "angelslim"


def write(request: Request) -> str:
    plan, notes = planned(request, ENGINE)
    computed = [step for step, computes in enumerate(mask(plan)) if computes]
    notes.append("hand the list to the helper as a set, and its cur_timestep every step's index")
    form = {"no_cache_steps": computed, "num_steps": len(plan.schedule)}
    return comment(notes) + yaml_text({"cache": form})


def read(text: str) -> Carried:
    form = read_section(text, "cache")
    steps, count = form.get("no_cache_steps"), form.get("num_steps")
    if not isinstance(steps, list) or type(count) is not int or not 0 < count <= 10_000:
        raise EngineError("cache: expected no_cache_steps, a list, and num_steps, a whole number")
    computed = {step for step in steps if type(step) is int and 0 <= step < count}
    if len(computed) != len(steps):
        raise EngineError(f"no_cache_steps: expected steps from 0 to {count - 1}, each once")
    return Carried(schedule="".join("C" if step in computed else "S" for step in range(count)))
