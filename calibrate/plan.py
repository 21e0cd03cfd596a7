"""Planning: from a run's Gram log to the schedule and forecast of each budget, proven on real runs.

Candidates come from the log alone; the best few are run on held-out prompts, and what wins there is judged on others,
beside uniform skipping and fewer steps. Nothing goes into an entry that was not run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import coeffs
from calibrate.errors import InvalidOption
from calibrate.gram import GramLog, NoPlan, at_steps, load_grams
from calibrate.log import load_run
from calibrate.policies import Setting, check_budget, schedule_setting
from calibrate.run import RunFolder, write_atomically
from calibrate.schedules import MOST_STEPS, Weights, local_search
from calibrate.stages import StagedProgram, Stages
from calibrate.yardstick import Yard, Yardstick, as_figures

CHOOSING_PROMPTS = 3
JUDGED_PROMPTS = 8
UNIFORM = "uniform, reuse"
UNIFORM_LINEAR = "uniform, linear"
FEWER_STEPS = "fewer steps"
BASELINES = (UNIFORM, UNIFORM_LINEAR, FEWER_STEPS)
PLAN = "plan"
VERDICT = "plan: "
PEAKS = (1.0, 2.0)
DAMPINGS = (0.1, 0.2, 0.3, 0.5)
TIE_DB = 0.5  # so near, the few choosing prompts decide nothing and the log, which holds more prompts, does
Say = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """A schedule with the forecast that it is to be run with.

    Attributes:
        forecast_of: ``residual`` or ``output``: what the runtime forecasts.
        weights: Of a fitted forecast: step -> weights of the last computed steps, newest first.
        signed: Its signed open-loop error in the guided output, mean over samples, as a fraction of the path.
        additive: The sum of its steps' errors likewise.
        damping: Share of plain reuse in fitted weights.
    """

    name: str
    schedule: str
    forecast: str
    forecast_of: str
    weights: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    signed: float = float("nan")
    additive: float = float("nan")
    damping: float = 0.0

    @property
    def how(self) -> str | Weights:
        """The forecast, with its weights where it has some."""
        return Weights(dict(self.weights), float("nan")) if self.weights else self.forecast

    def setting(self, policy: str | None = None) -> Setting:
        """As the verification's bench runs it; the same schedule and forecast is the same result under any name."""
        return schedule_setting(policy or self.name, self.schedule, self.forecast, self.forecast_of, self.weights)

    def as_plan(self, logs: Sequence[GramLog], figures: Mapping[str, float | None]) -> coeffs.Plan:
        """The record of an entry."""
        skipped = [step for step, letter in enumerate(self.schedule) if letter == "S"]
        sigmas = np.concatenate([*(log.sigmas[:-1] for log in logs), logs[-1].sigmas[-1:]])
        return coeffs.Plan(
            schedule=self.schedule,
            sigmas=tuple(float(s) for s in sigmas) if np.isfinite(sigmas).all() else None,
            forecast=self.forecast,
            forecast_of=self.forecast_of,
            weights=tuple(self.weights[step] for step in skipped) if self.weights else None,
            figures={name: None if value is None or not np.isfinite(value) else float(value)
                     for name, value in figures.items()},
        )  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """What planning found for one budget.

    Attributes:
        candidates: Everything that entered, baselines first.
        winner: The candidate that was chosen; without runs the one with the least open-loop error.
        figures: Of the winner on judged prompts, and of the baselines beside it; empty without runs.
    """

    computed: int
    candidates: list[Candidate]
    winner: Candidate
    yardstick: Yardstick
    figures: dict[str, float | None] = field(default_factory=dict)


class Planner:
    """Candidates for any budget up to ``most``, from the logs of all experts; tables and programs are made once."""

    def __init__(self, logs: Sequence[GramLog], most: int) -> None:
        self.logs = list(logs)
        kinds = [what for what in logs[0].grams if all(what in log.grams for log in logs)]
        self.stages = {what: Stages.of(logs, what) for what in kinds}
        self.num_steps, self.most = self.stages["output"].num_steps, most
        check_budget(most, self.num_steps)
        self.yard = Yard(self.stages["output"], most)
        self._programs: dict[tuple[str, str, float, float], StagedProgram] = {}

    def best(self, what: str, forecast: str, computed: int, *, peak: float = 1.0, damping: float = 0.0) -> str:
        """The best schedule by the costs of ``output`` or ``residual``."""
        key = (what, forecast, peak, damping)
        if key not in self._programs:
            costs = self.stages[what].costs(forecast, peak, damping=damping)
            self._programs[key] = StagedProgram(costs, self.most)
        return self._programs[key].best(computed)[0]

    def candidate(self, name: str, schedule: str, forecast: str, of: str, damping: float = 0.0) -> Candidate:
        """A candidate with its weights fitted and its error worked out."""
        weights: Mapping[int, tuple[float, ...]] = {}
        if forecast == "fitted":
            weights = self.stages[of].fit(schedule, damping)
            if not weights:
                forecast = "reuse"  # every step is computed
        found = Candidate(name, schedule, forecast, of, weights, damping=damping)
        outputs = self.stages["output"]
        signed, additive = (float(error(schedule, found.how).mean()) for error in (outputs.signed, outputs.additive))
        return replace(found, signed=signed, additive=additive)

    def candidates(self, computed: int) -> list[Candidate]:
        """The schedules worth running at a budget, each once: uniform ones, baselines first, then planned ones."""
        even = self.stages["output"].uniform(computed)
        found = [
            self.candidate(UNIFORM, even, "reuse", "residual"),
            self.candidate(UNIFORM_LINEAR, even, "linear", "residual"),
            self.candidate("uniform, linear outputs", even, "linear", "output"),
            self.candidate("uniform, fitted outputs", even, "fitted", "output"),
            self.candidate("uniform, fitted outputs, damped 0.3", even, "fitted", "output", 0.3),
        ]
        for what in self.stages:
            of = "outputs" if what == "output" else "residuals"
            for forecast in ("reuse", "linear", "fitted"):
                schedule = self.best(what, forecast, computed)
                found.append(self.candidate(f"planned, {forecast} {of}", schedule, forecast, what))
        for damping in DAMPINGS:
            name = f"planned, fitted outputs, damped {damping:g}"
            schedule = self.best("output", "fitted", computed, damping=damping)
            found.append(self.candidate(name, schedule, "fitted", "output", damping))
        # The errors of outputs are those that reach the image; a residual's forecast follows the latents better.
        for peak in PEAKS:
            schedule = self.best("output", "linear", computed, peak=peak)
            found.append(self.candidate(f"planned for outputs, linear, peak {peak:g}", schedule, "linear", "residual"))
        if max(problem.num_steps for problem in self.stages["output"].problems) <= MOST_STEPS["quadratic"]:
            schedule = self.best("output", "quadratic", computed)
            found.append(self.candidate("planned, quadratic outputs", schedule, "quadratic", "output"))
        found.append(self._searched(computed))
        distinct: dict[str, Candidate] = {}
        for candidate in found:
            setting = candidate.setting("")
            distinct.setdefault(json.dumps(setting.parameters, sort_keys=True), candidate)
        return list(distinct.values())

    def shortlist(self, computed: int, most: int) -> list[Candidate]:
        """The uniform ones, the ``most`` others with the least signed error, the first of each kind of forecast."""
        everything = self.candidates(computed)
        base = [c for c in everything if c.name.startswith("uniform")]
        others = sorted((c for c in everything if c not in base), key=lambda c: c.signed)
        kinds: dict[str, Candidate] = {}
        for candidate in others:
            for kind in (candidate.forecast, candidate.forecast_of, str(candidate.damping)):
                kinds.setdefault(kind, candidate)
        return base + [c for c in others if c in others[:most] or c in kinds.values()]

    def _searched(self, computed: int) -> Candidate:
        """The best schedule for linearly forecast outputs, moved until the signed error no longer falls."""
        stages = self.stages["output"]

        def value(schedule: str) -> float:
            if not stages.holds(schedule):
                return np.inf
            return float(stages.signed(schedule, "linear").mean() + 0.1 * stages.additive(schedule, "linear").mean())

        schedule, _ = local_search(self.best("output", "linear", computed), value)
        return self.candidate("searched, linear outputs", schedule, "linear", "output")


def budget_for(speedup: float, call_seconds: float, stack_seconds: float, num_steps: int) -> int:
    """The most computed steps with which the denoiser alone is ``speedup`` times as fast.

    Raises:
        InvalidOption: Not even one computed step is as fast.
    """
    head = call_seconds - stack_seconds
    computed = int(num_steps * (call_seconds / speedup - head) / stack_seconds + 1e-9)
    if not np.isfinite(speedup) or speedup < 1 or computed < 1:
        fastest = num_steps * call_seconds / (num_steps * head + stack_seconds)
        raise InvalidOption(f"--speedup {speedup:g}: expected 1 to {fastest:.3g} for this model and {num_steps} steps")
    return computed


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
    progress: bool = True,
    say: Say = lambda text: None,
) -> list[Planned]:
    """Plan the given budgets from a run, and with ``runs`` prove the plans and write them into its ``entry.yaml``.

    Args:
        computed: Numbers of computed steps; or ``speedup`` of the denoiser.
        steps: Plan for this many steps instead of the recorded number, where the log allows it.
        choosing: Held-out prompts on which the winner is chosen; ``num_prompts`` others judge it.
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
    say(f"planning {', '.join(map(str, budgets))} of {num_steps} steps from {len(logs[0].output)} samples")
    planner = Planner(logs, max(budgets))
    shortlists = {budget: planner.shortlist(budget, candidates) for budget in budgets}
    if not runs:
        best = {b: min(found, key=lambda c: (c.name in BASELINES, c.signed)) for b, found in shortlists.items()}
        return [_planned(planner, budget, found, best[budget]) for budget, found in shortlists.items()]
    from calibrate.bench import Bench
    from calibrate.case import open_case
    from calibrate.verify import held_out_prompts

    case = open_case(source, model=model, registry=None, out=None, dtype=dtype, device=device)
    if num_steps != case.num_steps:
        arguments = {**case.arguments, "num_inference_steps": num_steps}
        case = replace(case, arguments=arguments, num_steps=num_steps)
    held_out = held_out_prompts(case, prompts, choosing + num_prompts, seed, images)
    if len(held_out.prompts) < 2:
        raise InvalidOption("one held-out prompt: expected one to choose by and at least one other to judge by")
    choosing = min(choosing, max(1, len(held_out.prompts) // 3))
    first = replace(held_out, prompts=held_out.prompts[:choosing])
    rest = replace(held_out, prompts=held_out.prompts[choosing:])
    say(f"choosing among {sum(map(len, shortlists.values()))} candidates on {choosing} held-out prompts")
    chooser = Bench(case, first, None, progress)
    tried = _results(chooser, [c.setting() for found in shortlists.values() for c in found])
    winners = {b: _winner(found, tried[tried["budget"] == b]) for b, found in shortlists.items()}
    say(f"judging the winners and {len(BASELINES)} baselines on {len(rest.prompts)} other held-out prompts")
    judge = Bench(case, rest, None, progress)
    settings = []
    for budget, winner in winners.items():
        settings.append(winner.setting(PLAN))
        settings += [c.setting() for c in shortlists[budget] if c.name in BASELINES]
        settings.append(Setting(FEWER_STEPS, "fewer_steps", budget))
    judged = _results(judge, settings)
    planned = []
    for budget, winner in winners.items():
        figures = judged_figures(judged[judged["budget"] == budget])
        planned.append(_planned(planner, budget, shortlists[budget], winner, figures))
    folder = RunFolder.open(source).path
    _keep(folder, planned, tried, judged)
    coeffs.save(planned_entry(case.entry, logs, planned), folder / "entry.yaml")
    return planned


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


def score(values: pd.Series) -> float:
    """What candidates are chosen by: halfway between the mean and the worst prompt."""
    return float((values.mean() + values.min()) / 2)


def judged_figures(rows: pd.DataFrame) -> dict[str, float | None]:
    """Means and worst prompts of the plan, the baselines' beside them, and the paired gain over uniform reuse."""
    from calibrate.verdict import main_measure

    main = main_measure(rows)
    table = _values(rows, main)
    ours = table[PLAN].dropna()
    own = rows[rows["policy"] == PLAN]
    figures: dict[str, float | None] = {
        "prompts": len(ours),
        main: ours.mean(),
        f"worst_{main}": ours.min(),
        "speedup": float((own["uncached_seconds"] / own["seconds"]).mean()),
    }
    for measure in ("ssim", "latent_rel_l2"):
        if measure in own and own[measure].notna().any():
            figures[measure] = float(own[measure].mean())
    for name in BASELINES:
        if name in table:
            key = name.replace(", ", "_").replace(" ", "_")
            figures[f"{key}_{main}"] = table[name].mean()
            figures[f"{key}_worst_{main}"] = table[name].min()
    gain = (table[PLAN] - table[UNIFORM]).dropna()
    half = _half_width(gain.to_numpy())
    figures |= {"gain_db": gain.mean(), "gain_low_db": gain.mean() - half, "gain_high_db": gain.mean() + half}
    return {name: None if value is None or not np.isfinite(value) else float(value) for name, value in figures.items()}


def planned_entry(entry: coeffs.Entry, logs: Sequence[GramLog], planned: Sequence[Planned]) -> coeffs.Entry:
    """The entry with these plans in place of earlier ones for the same steps, and a word where fewer steps wins."""
    new = [p.winner.as_plan(logs, p.figures | as_figures(p.yardstick)) for p in planned]
    replaced = {(len(plan.schedule), plan.computed_steps) for plan in new}
    kept = [p for p in entry.plans or () if (len(p.schedule), p.computed_steps) not in replaced]
    plans = sorted([*kept, *new], key=lambda plan: (len(plan.schedule), -plan.computed_steps))
    warnings = [text for text in entry.warnings if not text.startswith(VERDICT)]
    verdict = fewer_steps_verdict(planned)
    return replace(entry, plans=tuple(plans), warnings=(*warnings, *([VERDICT + verdict] if verdict else [])))


def fewer_steps_verdict(planned: Sequence[Planned]) -> str | None:
    """Where fewer steps is better than the plan, in words; ``None`` where it never is."""
    lost = []
    for one in planned:
        main = next((name for name in ("psnr_db", "snr_db") if name in one.figures), None)
        ours, other = one.figures.get(main), one.figures.get(f"fewer_steps_{main}")
        if ours is not None and other is not None and other > ours:
            lost.append(f"{one.computed} ({other:.1f} against {ours:.1f} dB)")
    return f"fewer steps without a cache is better at {', '.join(lost)} computed steps" if lost else None


def _planned(
    planner: Planner, budget: int, found: list[Candidate], winner: Candidate, figures: dict | None = None
) -> Planned:
    yardstick = planner.yard.at(budget, winner.schedule, winner.how)
    return Planned(budget, found, winner, yardstick, figures or {})


def _results(bench: Any, settings: list[Setting]) -> pd.DataFrame:
    from calibrate.contest import Contest

    frame, refused = bench.results(Contest(settings, {}))
    if frame.empty or PLAN in refused:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise InvalidOption(f"no plan could be run ({reasons})")
    return frame


def _values(rows: pd.DataFrame, main: str) -> pd.DataFrame:
    """The main measure by prompt (rows) and policy (columns); a broken sample counts 0, an identical one 100 dB."""
    values = rows[main].where(~rows["identical"].astype(bool), 100.0).where(~rows["broken"].astype(bool), 0.0)
    keys = rows["prompt_id"].astype(str) + "-" + rows["seed"].astype(str)
    return rows.assign(value=values, key=keys).pivot_table("value", "key", "policy")


def _winner(found: list[Candidate], rows: pd.DataFrame) -> Candidate:
    from calibrate.verdict import main_measure

    table = _values(rows, main_measure(rows))
    scores = {c.name: score(table[c.name]) for c in found if c.name in table}
    tied = [c for c in found if scores.get(c.name, -np.inf) >= max(scores.values()) - TIE_DB]
    return min(tied, key=lambda c: c.additive)


def _half_width(values: np.ndarray) -> float:
    """Half the 95 % interval of a mean, by Student's t."""
    from scipy import stats

    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def _keep(folder: Path, planned: Sequence[Planned], tried: pd.DataFrame, judged: pd.DataFrame) -> None:
    """``plan.json``: every budget with its candidates, what they gave, and the yardstick; other budgets are kept."""
    file, own = folder / "plan.json", {(len(one.winner.schedule), one.computed) for one in planned}
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    rows = [row for row in earlier if (row["steps"], row["computed"]) not in own]
    for one in planned:
        of = tried[tried["budget"] == one.computed]
        main = next(name for name in ("psnr_db", "snr_db") if name in of)
        table = _values(of, main)
        rows.append({
            "steps": len(one.winner.schedule),
            "computed": one.computed,
            "winner": asdict(one.winner),
            "figures": one.figures,
            "yardstick": as_figures(one.yardstick),
            "candidates": [
                {name: getattr(c, name) for name in ("name", "schedule", "signed", "additive")}
                | {"score": score(table[c.name])}
                for c in one.candidates
                if c.name in table
            ],
        })  # fmt: skip
    rows.sort(key=lambda row: (row["steps"], -row["computed"]))
    write_atomically(file, (json.dumps(rows, indent=2, default=float) + "\n").encode())


def plan_table(planned: Sequence[Planned]) -> str:
    """The table of the command."""
    from calibrate.tables import aligned

    rows = []
    for one in planned:
        figures, winner = one.figures, one.winner
        main = next((name for name in ("psnr_db", "snr_db") if name in figures), "psnr_db")

        def cell(prefix: str, figures: dict = figures, main: str = main) -> str:
            value, worst = figures.get(f"{prefix}{main}"), figures.get(f"{prefix}worst_{main}")
            return "-" if value is None else f"{value:.1f} ({worst:.1f})"

        percent = one.yardstick.percent
        rows.append([
            str(one.computed), winner.name, cell(""), cell("uniform_reuse_"), cell("uniform_linear_"),
            cell("fewer_steps_"), "-" if not figures else f"{figures['speedup']:.2f}x",
            f"{100 * winner.signed:.2f} %", "-" if not np.isfinite(percent) else f"{percent:.0f} %", winner.schedule,
        ])  # fmt: skip
    header = ["computed", "winner", "dB (worst)", "uniform, reuse", "uniform, linear", "fewer steps", "speed-up"]
    return aligned([*header, "signed error", "of open-loop oracle", "schedule"], rows)
