"""Planning: from a run's Gram log to the schedule and forecast of each budget, proven on real runs.

Candidates come from the log alone; the best few are run on held-out prompts, and what wins there is judged on others,
beside uniform skipping and fewer steps. Nothing goes into an entry that was not run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from calibrate.errors import InvalidOption
from calibrate.model.prompts import PromptSet
from calibrate.planning.candidates import BASELINES, Candidate, Planner
from calibrate.planning.results import Planned, fidelity, judged_figures, keep, planned_entry, score
from calibrate.runs.entry_file import update_entry
from calibrate.runs.folder import RunFolder
from calibrate.runs.gram_log import GramLog, NoPlan, at_steps, load_grams
from calibrate.runs.pairs import load_run
from calibrate.trials.baselines import check_budget
from calibrate.trials.measures import main_measure
from calibrate.trials.setting import FEWER_STEPS, PLAN, Setting

CHOOSING_PROMPTS = 6
JUDGED_PROMPTS = 8
BY_RUNS, BY_LOG = 3, 2  # candidates of a budget that are run on all choosing prompts
# One prompt in twenty feeds errors back so violently that undamped forecasts lose 5 to 10 dB; few choosing prompts
# hold one.
DAMPING_COST_DB = 2.0
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
    candidates: int = 6,
    seed: int = 0,
    images: Iterable[str | os.PathLike] = (),
    dtype: str | None = None,
    device: str = "auto",
    cpu_offload: bool = False,
    allow_pickle: bool = False,
    pipe_args: Mapping[str, Any] | None = None,
    generate: Callable[..., Any] | None = None,
    modules: Any = None,
    progress: bool = True,
    say: Say = lambda text: None,
) -> list[Planned]:
    """Plan the given budgets from a run, and with ``runs`` prove the plans and write them into its ``entry.yaml``.

    Args:
        computed: Numbers of computed steps; or ``speedup`` of the denoiser.
        steps: Plan for this many steps instead of the recorded number, where the log allows it.
        choosing: Held-out prompts on which the winner is chosen; ``num_prompts`` others judge it.
        generate, modules: A model of your own, as :func:`calibrate.record` was given it.
        candidates: How many planned candidates of a budget are run at least, beside the uniform ones.

    Raises:
        CalibrateError, CoeffsError, RuntimeCacheError: What cannot be planned or run, and why.
    """
    if (computed is None) == (speedup is None):
        raise InvalidOption("--computed and --speedup: give exactly one of them")
    logs = _at_steps(load_grams(source), steps)
    num_steps = sum(log.num_steps for log in logs)
    if computed is None:
        computed = [budget_for(speedup, *_timing(source, logs), num_steps)]
    budgets = sorted(set(computed), reverse=True)
    for budget in budgets:
        check_budget(budget, num_steps)
    say(
        f"planning {', '.join(map(str, budgets))} of {num_steps} steps from {len(logs[0].output)} samples"
    )
    planner = Planner(logs, max(budgets))
    shortlists = {budget: planner.shortlist(budget, candidates) for budget in budgets}
    if not runs:
        best = {
            b: min(found, key=lambda c: (c.name in BASELINES, c.signed))
            for b, found in shortlists.items()
        }
        return [
            _planned(planner, budget, found, best[budget]) for budget, found in shortlists.items()
        ]
    from calibrate.trials.case import held_out_prompts, open_case

    case = open_case(
        source,
        model=model,
        registry=None,
        out=None,
        dtype=dtype,
        device=device,
        cpu_offload=cpu_offload,
        allow_pickle=allow_pickle,
        pipe_args=pipe_args,
        generate=generate,
        modules=modules,
    )
    if num_steps != case.num_steps:
        case = case.at_steps(num_steps)
    held_out = held_out_prompts(case, prompts, choosing + num_prompts, seed, images)
    if len(held_out.prompts) < 2:
        raise InvalidOption(
            "one held-out prompt: expected one to choose by and at least one other to judge by"
        )
    if len(held_out.prompts) < choosing + num_prompts:
        choosing = min(choosing, max(1, len(held_out.prompts) // 3))
    first = replace(held_out, prompts=held_out.prompts[:choosing])
    rest = replace(held_out, prompts=held_out.prompts[choosing:])
    winners, tried = _choose(case, first, shortlists, progress, say)
    say(f"judging the winners and their baselines on {len(rest.prompts)} other held-out prompts")
    settings = []
    for budget, winner in winners.items():
        settings.append(winner.setting(PLAN))
        settings += [c.setting() for c in shortlists[budget] if c.name in BASELINES]
        settings.append(Setting(FEWER_STEPS, "fewer_steps", budget))
    judged = _results(case, rest, settings, progress)
    planned = []
    for budget, winner in winners.items():
        figures = judged_figures(judged[judged["budget"] == budget])
        planned.append(_planned(planner, budget, shortlists[budget], winner, figures))
    folder = RunFolder.open(source).path
    keep(folder, planned, tried)
    # Planning takes hours, in which a fit may have written the entry anew: its plans are all that changes.
    update_entry(folder / "entry.yaml", lambda now: planned_entry(now or case.entry, logs, planned))
    return planned


def _choose(
    case: Any,
    prompts: PromptSet,
    shortlists: Mapping[int, list[Candidate]],
    progress: bool,
    say: Say,
) -> tuple[dict[int, Candidate], pd.DataFrame]:
    """The winner of every budget, and what candidates gave: all of them on a few prompts, the best on the others."""
    screening = max(1, len(prompts.prompts) // 3)
    everyone = [candidate for found in shortlists.values() for candidate in found]
    say(f"screening {len(everyone)} candidates on {screening} held-out prompts")
    some = replace(prompts, prompts=prompts.prompts[:screening])
    tried = _results(case, some, [candidate.setting() for candidate in everyone], progress)
    finalists = {
        b: _finalists(found, tried[tried["budget"] == b]) for b, found in shortlists.items()
    }
    if len(prompts.prompts) > screening:
        settings = [candidate.setting() for found in finalists.values() for candidate in found]
        say(f"choosing among the {len(settings)} best on {len(prompts.prompts) - screening} more")
        more = replace(prompts, prompts=prompts.prompts[screening:])
        tried = pd.concat([tried, _results(case, more, settings, progress)], ignore_index=True)
    return {b: _winner(found, tried[tried["budget"] == b]) for b, found in finalists.items()}, tried


def _finalists(found: list[Candidate], rows: pd.DataFrame) -> list[Candidate]:
    """The best few by their runs, and the best few of the others by the log, which holds more prompts."""
    scores = _scores(found, rows)
    ran = sorted((c for c in found if c.name in scores), key=lambda c: -scores[c.name])
    chosen = ran[:BY_RUNS]
    return chosen + sorted(ran[BY_RUNS:], key=lambda c: c.additive)[:BY_LOG]


def _winner(found: list[Candidate], rows: pd.DataFrame) -> Candidate:
    """The best by runs and log together, both in dB: a few prompts with feedback, and all recorded ones without.

    The runs count by :func:`calibrate.planning.results.score`, the log by ``-20 log10`` of the additive
    open-loop error. A
    fitted forecast then gives way to the most damped one that costs at most ``DAMPING_COST_DB`` in the runs.
    """
    scores = _scores(found, rows)
    ran = [c for c in found if c.name in scores]
    best = max(ran, key=lambda c: scores[c.name] - 20 * np.log10(max(c.additive, 1e-9)))
    if best.forecast != "fitted":
        return best

    def alike(one: Candidate) -> bool:
        same = (one.forecast, one.forecast_of, one.is_uniform) == (
            best.forecast,
            best.forecast_of,
            best.is_uniform,
        )
        return same and scores[best.name] - scores[one.name] <= DAMPING_COST_DB

    return max(filter(alike, ran), key=lambda c: (c.damping, c is best))


def _scores(found: list[Candidate], rows: pd.DataFrame) -> dict[str, float]:
    table = fidelity(rows, main_measure(rows))
    return {c.name: score(table[c.name].dropna()) for c in found if c.name in table}


def _planned(
    planner: Planner,
    budget: int,
    found: list[Candidate],
    winner: Candidate,
    figures: dict | None = None,
) -> Planned:
    return Planned(budget, found, winner, figures or {})


def _results(
    case: Any, prompts: PromptSet, settings: list[Setting], progress: bool
) -> pd.DataFrame:
    from calibrate.trials.bench import Bench, Entered

    frame, refused = Bench(case, prompts, None, progress).results(Entered(settings))
    if frame.empty or PLAN in refused:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise InvalidOption(f"no plan could be run ({reasons})")
    return frame


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


def _timing(source: str | os.PathLike, logs: Sequence[GramLog]) -> tuple[float, float]:
    """Seconds of a denoiser call and of its block stack, mean over the steps of all experts."""
    known = load_run(source).timing
    if any(log.expert not in known for log in logs):
        raise InvalidOption(f"{source}: no timing in it; give --computed instead of --speedup")
    steps = [log.num_steps for log in logs]
    call, stack = np.average([known[log.expert] for log in logs], axis=0, weights=steps)
    return float(call), float(stack)
