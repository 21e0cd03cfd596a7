"""A plan as a multistep solver, in JSON: levels and weights, for samplers that know nothing of caches.

Evaluation i takes place at ``levels[i]``; behind it ``x += sum_j steps[i][j] * predictions[j]``, the newest first. x
is what Euler's method in sigma moves: the latents of flow matching, and latents over alpha of DDIM.
"""

from itertools import pairwise

from coeffs.engines.plans import plan_of
from coeffs.engines.setting import Carried, Request
from coeffs.engines.text import json_text, read_json, value_of
from coeffs.entry.fields import Numbers, Schedule
from coeffs.entry.schema import Plan
from coeffs.errors import EngineError


def write(request: Request) -> str:
    plan = plan_of(request.entry, request.schedule)
    sigmas, steps = plan.sigmas or (), len(plan.schedule)
    if plan.forecast_of != "guided" or len(sigmas) <= steps:
        raise EngineError(
            f"{request.entry.label}: only a plan with forecasts of the guided prediction and noise levels of all "
            "steps is a solver; `calibrate plan` makes one where it can watch the pipeline's scheduler"
        )
    levels = [sigmas[step] for step in range(steps) if plan.schedule[step] == "C"]
    form = {
        "schedule": plan.schedule,
        "levels": [*levels, sigmas[steps]],
        "steps": multistep(plan),
    }
    return json_text([f"{request.entry.label}, teacal registry"], form)


def multistep(plan: Plan) -> list[list[float]]:
    """What each evaluation adds: factors of all predictions so far, the newest first, the steps in sigma in them."""
    levels = plan.sigmas or ()
    computed = [step for step, letter in enumerate(plan.schedule) if letter == "C"]
    rows = []
    for count, (first, after) in enumerate(
        pairwise([*computed, len(plan.schedule)]), start=1
    ):
        row = [levels[first + 1] - levels[first], *[0.0] * (count - 1)]
        for step in range(first + 1, after):
            moved = levels[step + 1] - levels[step]
            for place, weight in enumerate(_weights(plan, step, computed[:count][::-1])):
                row[place] += moved * weight
        rows.append(row)
    return rows


def _weights(plan: Plan, step: int, computed: list[int]) -> Numbers:
    """Of the predictions in a skipped step; ``computed`` are the steps before it, the newest first."""
    if plan.forecast != "linear" or len(computed) == 1:
        return plan.weights_by_step.get(step, (1.0,))
    levels = plan.sigmas or ()
    newest, older = (levels[anchor] for anchor in computed[:2])
    further = (levels[step] - newest) / (newest - older)
    return (1 + further, -further)


def read(text: str) -> Carried:
    return Carried(schedule=value_of(read_json(text), "schedule", Schedule))
