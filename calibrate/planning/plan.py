"""Planning: from a run to the schedule and forecast of each budget, fitted where it runs and proven on real runs.

Schedules follow from the uncached trajectories of the recorded prompts, weights from running these prompts under the
schedule. What wins on other prompts is judged on others again, beside uniform skipping and fewer steps. Nothing goes
into an entry that was not run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import pandas as pd

from calibrate.errors import InvalidOption
from calibrate.model.prompts import PromptSet
from calibrate.planning.candidates import (
    BASELINES,
    Candidate,
    Planner,
    Quantity,
    fewer_steps,
    finalists,
)
from calibrate.planning.closed_loop import Fits
from calibrate.planning.problem import Problem, sigmas_of
from calibrate.planning.results import (
    Planned,
    judged_figures,
    keep,
    planned_entry,
    scores_of,
)
from calibrate.planning.trajectories import (
    NoSolver,
    gaussian_gains,
    measured_gains,
    problem_of,
)
from calibrate.runs.entry_file import update_entry
from calibrate.runs.gram_log import NoPlan, at_steps, load_grams
from calibrate.runs.lock import alone
from calibrate.runs.pairs import load_run
from calibrate.runs.purposes import CHOOSING, JUDGED, divided_prompts, note
from calibrate.trials.baselines import check_budget
from calibrate.trials.case import Case, open_case
from calibrate.trials.setting import PLAN, Setting

CHOOSING_PROMPTS = 12  # of a load model's days, six choose plans that are 0.2 dB worse, twenty hardly better ones
JUDGED_PROMPTS = 8
Say = Callable[[str], None]


@alone("planning with")
def plan(
    source: str | os.PathLike,
    *,
    computed: Sequence[int] | None = None,
    speedup: float | None = None,
    steps: int | None = None,
    runs: bool = True,
    model: Any = None,
    prompts: Any = None,
    num_prompts: int = JUDGED_PROMPTS,
    choosing: int = CHOOSING_PROMPTS,
    candidates: int | None = None,
    anchors: int | None = None,
    seed: int = 0,
    images: Iterable[str | os.PathLike] = (),
    dtype: str | None = None,
    device: str = "auto",
    progress: bool = True,
    say: Say = lambda text: None,
    **loading: Any,
) -> list[Planned]:
    """Plan the given budgets from a run, and with ``runs`` fit and prove the plans and write them into ``entry.yaml``.

    Args:
        computed: Numbers of computed steps; or ``speedup`` of the denoiser.
        steps: Plan for this many steps instead of the recorded number.
        choosing: Held-out prompts on which the winner is chosen; ``num_prompts`` others judge it.
        candidates: Planned schedules of a budget whose weights are fitted, beside the uniform one; by default six up
            to a quarter of the steps, three at half.
        loading: How the model is loaded and called, as :func:`calibrate.trials.case.open_case` takes it: such as
            ``generate`` and ``modules`` for a model of your own.
        anchors: Most predictions that a forecast uses, where memory counts; all by default.

    Raises:
        CalibrateError, CoeffsError, RuntimeCacheError: What cannot be planned or run, and why.
    """
    if (computed is None) == (speedup is None):
        raise InvalidOption("--computed and --speedup: give exactly one of them")
    if not runs:
        planner = _from_the_log(source, steps)
        budgets = _budgets(planner.problem, computed, speedup, source, say)
        return [_without_runs(budget, planner.entrants(budget)) for budget in budgets]
    case = open_case(
        source, model=model, registry=None, out=None, dtype=dtype, device=device, **loading
    )
    if steps is not None and steps != case.num_steps:
        case = case.at_steps(steps)
    for budget in computed or ():
        check_budget(budget, case.num_steps)
    offered = case.offered(prompts, seed, images)
    divided = divided_prompts(case.purposes, offered, choosing, num_prompts)
    planner = _from_runs(case, steps, anchors, progress, say)
    budgets = _budgets(planner.problem, computed, speedup, source, say)
    entered = {
        budget: planner.entrants(budget, candidates) + fewer_steps(budget)
        for budget in budgets
    }
    planned = _proven(case, planner, entered, divided, progress, say)
    keep(case.folder, planned, anchors)
    # Planning takes hours, in which a fit may have written the entry anew: its plans are all that changes.
    update_entry(
        case.folder / "entry.yaml",
        lambda now: planned_entry(now or case.entry, planner.sigmas, planned),
    )
    return planned


def _proven(
    case: Case,
    planner: Planner,
    entered: dict[int, list[Candidate]],
    divided: tuple[PromptSet, PromptSet],
    progress: bool,
    say: Say,
) -> list[Planned]:
    """The winner of every budget, by runs alone, with its figures on other prompts."""
    first, rest = divided
    # Before anything is chosen: an interrupted planning has seen these prompts too.
    note(case.folder, [prompt.prompt_id for prompt in first.prompts], CHOOSING)
    say(f"choosing by runs of {len(first.prompts)} held-out prompts")
    ran = [candidate for entrants in entered.values() for candidate in finalists(entrants)]
    tried, _ = _results(case, first, [candidate.setting() for candidate in ran], progress)
    scores = {budget: scores_of(rows) for budget, rows in tried.items()}
    winners = {
        budget: planner.completed(_winner(own, scores[budget]))
        for budget, own in entered.items()
    }
    say(f"judging winners and rivals on {len(rest.prompts)} other held-out prompts")
    settings = [winner.setting(PLAN) for winner in winners.values()]
    settings += [c.setting() for c in ran if c.plan is None or c.name in BASELINES]
    judged, floor = _results(case, rest, settings, progress)
    note(case.folder, [prompt.prompt_id for prompt in rest.prompts], JUDGED)
    return [
        Planned(b, own, winners[b], judged_figures(judged[b], floor), scores[b])
        for b, own in entered.items()
    ]


def _from_the_log(
    source: str | os.PathLike, steps: int | None, what: Quantity | None = None
) -> Planner:
    """From the Gram log: the guided prediction where all experts have it, or what is asked for."""
    logs = load_grams(source)
    recorded = sum(log.num_steps for log in logs)
    if steps not in (None, recorded):
        if len(logs) > 1:
            names = ", ".join(log.expert for log in logs)
            raise NoPlan(
                f"{steps} steps from a log of {recorded} by {names}, who would take over elsewhere; record {steps}"
            )
        logs = [at_steps(logs[0], steps)]
    what = what or ("guided" if all(log.guided is not None for log in logs) else "output")
    return Planner(Problem.of(logs, what), what, sigmas_of(logs))


def _from_runs(
    case: Case, steps: int | None, anchors: int | None, progress: bool, say: Say
) -> Planner:
    """From trajectories, with measured and with Gaussian gains; from the log where no solver can be watched."""
    try:
        fits = Fits.of(case, progress, say, anchors)
    except NoSolver as error:
        say(f"{error}; planning forecasts of its outputs, without fitted weights")
        return _from_the_log(case.folder, steps, "output")
    trajectories = fits.trajectories
    gains = measured_gains(fits.runner, trajectories)
    return Planner(
        problem_of(trajectories, gains),
        "guided",
        trajectories[0].sigmas,
        gaussian=problem_of(trajectories, gaussian_gains(trajectories)),
        fits=fits,
    )


def _budgets(
    problem: Problem,
    computed: Sequence[int] | None,
    speedup: float | None,
    source: str | os.PathLike,
    say: Say,
) -> list[int]:
    """The numbers of computed steps, the largest first."""
    if speedup is not None:
        steps = np.diff([*problem.walls, problem.num_steps])
        timing = sorted(load_run(source).timing.items())[: len(steps)]
        if len(timing) < len(steps):
            raise InvalidOption(
                f"{source}: no timing in it; give --computed instead of --speedup"
            )
        # Seconds of a denoiser call and of its block stack, mean over the steps of all experts.
        call, stack = np.average([seconds for _, seconds in timing], axis=0, weights=steps)
        computed = [budget_for(speedup, float(call), float(stack), problem.num_steps)]
    budgets = sorted(set(computed or ()), reverse=True)
    for budget in budgets:
        check_budget(budget, problem.num_steps)
    say(
        f"planning {', '.join(map(str, budgets))} of {problem.num_steps} steps from "
        f"{len(problem.gram)} samples"
    )
    return budgets


def _without_runs(budget: int, entrants: list[Candidate]) -> Planned:
    """The planned schedule with the least open-loop error wins."""
    planned = [candidate for candidate in entrants if candidate.name not in BASELINES]
    return Planned(budget, entrants, min(planned, key=attrgetter("cost")))


def _winner(entrants: list[Candidate], scores: dict[str, float]) -> Candidate:
    """The best plan by runs alone; fewer steps are none."""
    plans = [candidate for candidate in entrants if candidate.plan is not None]
    return max(plans, key=lambda plan: scores.get(plan.name, -np.inf))


def _results(
    case: Case, prompts: PromptSet, settings: list[Setting], progress: bool
) -> tuple[dict[int, pd.DataFrame], dict[str, Any]]:
    """The runs of all settings by budget, and the noise floor of these prompts."""
    from calibrate.trials.bench import Bench

    bench = Bench(case, prompts, progress=progress)
    frame, refused = bench.results(settings)
    if frame.empty or PLAN in refused:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise InvalidOption(f"no plan could be run ({reasons})")
    return dict(iter(frame.groupby("budget"))), bench.floor()


def budget_for(
    speedup: float, call_seconds: float, stack_seconds: float, num_steps: int
) -> int:
    """The most computed steps with which the denoiser alone is ``speedup`` times as fast.

    Raises:
        InvalidOption: Not even one computed step is as fast.
    """
    head = call_seconds - stack_seconds
    computed = int(num_steps * (call_seconds / speedup - head) / stack_seconds + 1e-9)
    if not np.isfinite(speedup) or speedup < 1 or computed < 1:
        fastest = num_steps * call_seconds / (num_steps * head + stack_seconds)
        raise InvalidOption(
            f"--speedup {speedup:g}: expected 1 to {fastest:.3g} for this model and {num_steps} steps"
        )
    return computed
