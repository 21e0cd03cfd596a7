"""Planning: from a run to the schedule and forecast of each budget, fitted where it runs and proven on real runs.

Schedules follow from the uncached trajectories of the recorded prompts, weights from running these prompts under the
schedule. What wins on other prompts is judged on others again, beside uniform skipping and fewer steps. Nothing goes
into an entry that was not run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from calibrate.errors import InvalidOption
from calibrate.model.prompts import PromptSet
from calibrate.planning.candidates import (
    BASELINES,
    Candidate,
    Planner,
    Quantity,
    fewer_steps,
    finalists,
    score,
)
from calibrate.planning.closed_loop import Fits
from calibrate.planning.problem import Problem
from calibrate.planning.results import Planned, fidelity, judged_figures, keep, planned_entry
from calibrate.planning.trajectories import (
    NoSolver,
    Runner,
    gaussian_gains,
    load_trajectories,
    measured_gains,
    problem_of,
)
from calibrate.runs.entry_file import update_entry
from calibrate.runs.folder import RunFolder
from calibrate.runs.gram_log import GramLog, NoPlan, at_steps, load_grams
from calibrate.runs.pairs import load_run
from calibrate.runs.purposes import CHOOSING, JUDGED, divided_prompts, note
from calibrate.trials.baselines import check_budget
from calibrate.trials.case import Case
from calibrate.trials.measures import main_measure
from calibrate.trials.setting import PLAN, Setting

CHOOSING_PROMPTS = (
    12  # of a load model's days, six choose plans that are 0.2 dB worse, twenty hardly better ones
)
JUDGED_PROMPTS = 8
Say = Callable[[str], None]


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
        candidates: Planned schedules of a budget whose weights are fitted, beside the uniform one; by default as
            many as cost one and a half recordings, at least three.
        loading: How the model is loaded and called, as :func:`calibrate.trials.case.open_case` takes it: such as
            ``generate`` and ``modules`` for a model of your own.
        anchors: Most predictions that a forecast uses, where memory counts; all by default.

    Raises:
        CalibrateError, CoeffsError, RuntimeCacheError: What cannot be planned or run, and why.
    """
    if (computed is None) == (speedup is None):
        raise InvalidOption("--computed and --speedup: give exactly one of them")
    if not runs:
        return _from_the_log(source, computed, speedup, steps, say)
    from calibrate.trials.case import open_case

    case = open_case(
        source, model=model, registry=None, out=None, dtype=dtype, device=device, **loading
    )
    if steps is not None and steps != case.num_steps:
        case = case.at_steps(steps)
    if computed is not None:
        _check_budgets(computed, case.num_steps)
    first, rest = divided_prompts(
        case.purposes, case.offered(prompts, seed, images), choosing, num_prompts
    )
    fits, problem, gaussian, sigmas = _prepared(case, source, steps, anchors, progress, say)
    budgets = _budgets(computed, speedup, source, problem)
    planner = Planner(problem, max(budgets), gaussian)
    entered = {
        budget: _candidates(planner, fits, budget, candidates) + fewer_steps(budget)
        for budget in budgets
    }
    # Before anything is chosen: an interrupted planning has seen these prompts too.
    note(case.folder, [prompt.prompt_id for prompt in first.prompts], CHOOSING)
    say(f"choosing by runs of {len(first.prompts)} held-out prompts")
    ran = [candidate for entrants in entered.values() for candidate in finalists(entrants)]
    tried, _ = _results(case, first, [candidate.setting() for candidate in ran], progress)
    choices = {
        budget: _choice(entrants, tried[tried["budget"] == budget])
        for budget, entrants in entered.items()
    }
    say(f"judging winners and rivals on {len(rest.prompts)} other held-out prompts")
    settings = []
    for budget, (winner, _) in choices.items():
        rivals = [c for c in entered[budget] if c.plan is None or c.name in BASELINES]
        settings += [winner.setting(PLAN), *(rival.setting() for rival in rivals)]
    judged, floor = _results(case, rest, settings, progress)
    note(case.folder, [prompt.prompt_id for prompt in rest.prompts], JUDGED)
    planned = [
        Planned(b, entered[b], winner, judged_figures(judged[judged["budget"] == b], floor), why)
        for b, (winner, why) in choices.items()
    ]
    folder = RunFolder.open(source).path
    keep(folder, planned, tried)
    # Planning takes hours, in which a fit may have written the entry anew: its plans are all that changes.
    update_entry(
        folder / "entry.yaml", lambda now: planned_entry(now or case.entry, sigmas, planned)
    )
    return planned


def _from_the_log(
    source: str | os.PathLike,
    computed: Sequence[int] | None,
    speedup: float | None,
    steps: int | None,
    say: Say,
) -> list[Planned]:
    """Schedules from the Gram log, with linear forecasts: weights need runs."""
    logs = _at_steps(load_grams(source), steps)
    what: Quantity = "guided" if all(log.guided is not None for log in logs) else "output"
    problem = Problem.of(logs, what)
    budgets = _budgets(computed, speedup, source, problem)
    say(
        f"planning {', '.join(map(str, budgets))} of {problem.num_steps} steps from "
        f"{len(problem.gram)} samples"
    )
    planner = Planner(problem, max(budgets))
    planned = []
    for budget in budgets:
        entrants = planner.simple(budget, what)
        entrants += planner.planned(budget, what)
        best = min((c for c in entrants if c.name not in BASELINES), key=lambda c: c.cost)
        planned.append(Planned(budget, entrants, best))
    return planned


def _prepared(
    case: Case,
    source: str | os.PathLike,
    steps: int | None,
    anchors: int | None,
    progress: bool,
    say: Say,
) -> tuple[Fits | None, Problem, Problem | None, NDArray[np.float64]]:
    """What fits weights, the problem with measured and with Gaussian gains, and the noise levels.

    Where the solver cannot be watched nothing is fitted, and no gain is measured.
    """
    runner = Runner(case)
    try:
        trajectories = load_trajectories(runner, progress, say)
    except NoSolver as error:
        say(f"{error}; planning forecasts of its outputs, without fitted weights")
        logs = _at_steps(load_grams(source), steps)
        sigmas = np.concatenate([*(log.sigmas[:-1] for log in logs), logs[-1].sigmas[-1:]])
        return None, Problem.of(logs), None, sigmas
    gains = measured_gains(runner, trajectories, progress, say)
    fits = Fits(runner, trajectories, anchors, progress, say)
    gaussian = problem_of(trajectories, gaussian_gains(trajectories))
    return fits, problem_of(trajectories, gains), gaussian, trajectories[0].sigmas


def _candidates(
    planner: Planner, fits: Fits | None, computed: int, count: int | None
) -> list[Candidate]:
    if fits is None:
        return planner.simple(computed, "output") + planner.planned(computed, "output")
    return planner.simple(computed, "guided") + [
        planner.fitted(name, schedule, fits.fit(schedule))
        for name, schedule in planner.schedules(computed, count).items()
    ]


def _choice(entrants: list[Candidate], rows: pd.DataFrame) -> tuple[Candidate, str]:
    """The best plan by runs alone, and in words by how much."""
    table = fidelity(rows, main_measure(rows))
    scores = table.apply(lambda column: score(column.dropna().to_numpy())).sort_values()[::-1]
    plans = {c.name: c for c in entrants if c.plan is not None}
    winner = plans[next(name for name in scores.index if name in plans)]
    others = [f"{name} {value:.1f}" for name, value in scores.items() if name != winner.name]
    chosen = f"{winner.name}: {scores[winner.name]:.1f} dB on {len(table)} prompts"
    return winner, f"{chosen}; {', '.join(others[:3])}"


def _results(
    case: Case, prompts: PromptSet, settings: list[Setting], progress: bool
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The runs of all settings, and the noise floor of these prompts."""
    from calibrate.trials.bench import Bench
    from calibrate.trials.setting import Entered

    bench = Bench(case, prompts, None, progress)
    frame, refused = bench.results(Entered(settings))
    if frame.empty or PLAN in refused:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise InvalidOption(f"no plan could be run ({reasons})")
    return frame, bench.floor()


def _budgets(
    computed: Sequence[int] | None,
    speedup: float | None,
    source: str | os.PathLike,
    problem: Problem,
) -> list[int]:
    """Numbers of computed steps, the largest first."""
    if computed is None:
        assert speedup is not None
        computed = [budget_for(speedup, *_timing(source, problem), problem.num_steps)]
    _check_budgets(computed, problem.num_steps)
    return sorted(set(computed), reverse=True)


def _check_budgets(computed: Sequence[int], num_steps: int) -> None:
    for budget in computed:
        check_budget(budget, num_steps)


def budget_for(speedup: float, call_seconds: float, stack_seconds: float, num_steps: int) -> int:
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


def _at_steps(logs: list[GramLog], steps: int | None) -> list[GramLog]:
    """The logs for another number of steps, where that is sound."""
    if len(logs) == 1:
        return [at_steps(logs[0], steps or logs[0].num_steps)]
    recorded = sum(log.num_steps for log in logs)
    if steps not in (None, recorded):
        names = ", ".join(log.expert for log in logs)
        raise NoPlan(
            f"{steps} steps from a log of {recorded} by {names}, who would take over elsewhere; record {steps}"
        )
    return logs


def _timing(source: str | os.PathLike, problem: Problem) -> tuple[float, float]:
    """Seconds of a denoiser call and of its block stack, mean over the steps of all experts."""
    known = load_run(source).timing
    steps = np.diff([*problem.walls, problem.num_steps])
    if len(known) < len(steps):
        raise InvalidOption(f"{source}: no timing in it; give --computed instead of --speedup")
    call, stack = np.average(
        [known[name] for name in sorted(known)][: len(steps)], axis=0, weights=steps
    )
    return float(call), float(stack)
