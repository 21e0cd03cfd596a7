"""cache-dit: a fixed ``steps_computation_mask`` for ``load_configs``, in YAML, from one of the entry's plans.

1 computes a step, 0 uses the cache; ``static`` follows the mask exactly. The first step must compute.
"""

from coeffs.engines.setting import Carried, Request, comment, described
from coeffs.engines.text import read_yaml
from coeffs.errors import EngineError


def write(request: Request) -> str:
    entry, schedule = request.entry, request.schedule
    notes = [described(entry)]
    if schedule is None:
        plans = list(dict.fromkeys(plan.schedule for plan in entry.plans or ()))
        if len(plans) != 1:
            known = f"has the plans {', '.join(plans)}" if plans else "has no plan"
            raise EngineError(
                f"{entry.label} {known}: give one with --schedule CCSC..., one letter per step"
            )
        schedule = plans[0]
    if not schedule.startswith("C") or set(schedule) - {"C", "S"}:
        raise EngineError(f"schedule {schedule[:40]!r}: expected letters C and S that begin with C")
    notes.append(f"{schedule.count('C')} of {len(schedule)} steps compute: {schedule}")
    mask = ", ".join("1" if letter == "C" else "0" for letter in schedule)
    return (
        f"{comment(notes)}cache_config:\n  num_inference_steps: {len(schedule)}\n"
        f"  steps_computation_mask: [{mask}]\n  steps_computation_policy: static\n"
    )


def read(text: str) -> Carried:
    form = read_yaml(text, required={"cache_config"})["cache_config"]
    mask = form.get("steps_computation_mask") if isinstance(form, dict) else None
    if (
        not isinstance(mask, list)
        or not mask
        or any(type(step) is not int or step not in (0, 1) for step in mask)
    ):
        raise EngineError("steps_computation_mask: expected a list of 0 and 1, one per step")
    return Carried(schedule="".join("SC"[step] for step in mask))
