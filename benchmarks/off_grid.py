"""Noise levels between those of the recorded schedule, against the plans of an entry: a table of docs/planning.md.

    python -m benchmarks.off_grid RUN --prompts C --computed 15,9,5 --closed-loop 5

RUN has plans of the guided prediction; its scheduler is Euler's method of flow matching. A plan is a multistep solver
with one evaluation per computed step. Here its evaluations may be at any noise level. Beginning with the plan's, each
level in turn is moved by a step of the schedule while that helps, then by halves and quarters of one. What helps is
said by the errors on the recorded trajectories (open loop: no evaluation is made), at the budgets of
``--closed-loop`` also by runs: half of the recorded prompts fit the factors, and both halves have to gain. The factors
are then fitted in closed loop on all recorded prompts, as those of plans, and judged on prompts that served nothing
else. RUN keeps every figure beside its trajectories; the same command continues where it was stopped.
"""

import copy
import functools
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from scipy.interpolate import CubicSpline

from benchmarks.common import RESULTS, surroundings
from calibrate.fitting.statistics import mean_interval
from calibrate.model.protocol import canonical_sha256
from calibrate.planning.candidates import score
from calibrate.planning.closed_loop import combined, solve
from calibrate.planning.lockstep import Generation
from calibrate.planning.search import computed_of
from calibrate.planning.trajectories import (
    Runner,
    load_trajectories,
    measured_gains,
)
from calibrate.runs.files import write_json
from calibrate.runs.purposes import held_out_prompts
from calibrate.runs.trajectory import Trajectory
from calibrate.trials.bench import Bench
from calibrate.trials.case import Case, open_case
from calibrate.trials.measures import compare_all
from calibrate.trials.sampler import Sampler
from runtime import plan_scheduler

PLAN = "plan"
OPEN, CLOSED = "levels moved in open loop", "levels moved in closed loop"
WHOLE, QUARTERS = ", whole steps", ", quarters of a step"
ARMS = (PLAN, OPEN + WHOLE, OPEN + QUARTERS, CLOSED + WHOLE, CLOSED + QUARTERS)
FRACTIONS = (0.5, 0.25)  # of a step of the schedule
# Evaluations that one generation can be asked for, far above what any search needs.
MOST_EVALUATIONS = 10_000

Places = tuple[float, ...]  # steps of the recorded schedule, and fractions between them
Factors = list[list[float]]  # an evaluation's: of all predictions so far, the newest first
Better = Callable[[Places, Places], bool]


@click.command()
@click.argument("run", required=False, type=click.Path(exists=True, file_okay=False))
@click.option("--name", default="off-grid", show_default=True, help="Of the result file.")
@click.option("--computed", default="15,9,5", show_default=True)
@click.option(
    "--closed-loop", default="", help="Budgets at which levels are moved by runs too."
)
@click.option("--model", help="Weights, where the run's are not known by name.")
@click.option("--prompts", help="What all are judged by.")
@click.option("--num-prompts", type=int, default=12, show_default=True)
@click.option(
    "--seed", type=int, default=90000, show_default=True, help="Of the first judged one."
)
def main(run: str | None, name: str, model: str | None, **options: Any) -> None:
    path = RESULTS / f"{name}.json"
    if run is not None:
        for key in ("computed", "closed_loop"):
            options[key] = [int(part) for part in options[key].split(",") if part]
        figures = measured(open_case(run, model=model), **options)
        path.write_text(
            json.dumps({"surroundings": surroundings(), **figures}, indent=1) + "\n"
        )
        click.echo(f"{path}\n", err=True)
    click.echo(markdown(json.loads(path.read_text())))


def measured(
    case: Case,
    computed: Sequence[int],
    closed_loop: Sequence[int],
    prompts: Any,
    num_prompts: int,
    seed: int,
) -> dict[str, Any]:
    """Search, fit and judge what the run lacks of each budget."""
    runner = Runner(case, True, say)
    trajectories = load_trajectories(runner)
    open_loop = OpenLoop(trajectories, measured_gains(runner, trajectories))
    judged = held_out_prompts(case.purposes, case.offered(prompts, seed, ()), num_prompts)
    bench = Bench(case, judged, None, progress=True)
    times = torch.zeros(MOST_EVALUATIONS)
    asked = free(case.session.driver.scheduler, times, lambda prediction, latents: latents)
    runner.session = case.session.driven_by(with_scheduler(case.session.driver, asked))
    plans = {plan.computed_steps: plan for plan in case.entry.plans or ()}
    with runner.running([group.prompt for group in runner.groups]) as running:
        every = Lockstep(running, trajectories, times)
        figures = []
        for budget in computed:
            plan = plans[budget]
            key = canonical_sha256([plan.schedule, plan.weights])[:12]
            memory = Memory(runner.folder / f"off-grid-{key}.json")
            start = tuple(map(float, computed_of(plan.schedule)))
            arms = searched(start, open_loop.better, OPEN, settled=True)
            if budget in closed_loop:
                arms |= searched(start, Halves(every, memory).better, CLOSED)
            figures.append(of_budget(plan, arms, every, bench, memory))
    return {
        "model": case.entry.model,
        "steps": case.num_steps,
        "dtype": case.identity["dtype"],
        "prompts": len(judged.prompts),
        "recorded": len(trajectories),
        "budgets": figures,
    }


def of_budget(
    plan: Any, arms: dict[str, Places], every: "Lockstep", bench: Bench, memory: "Memory"
) -> dict[str, Any]:
    """The levels of each arm, and its figures on the judged prompts."""
    values = {PLAN: judge(bench, memory, PLAN, lambda own: plan_scheduler(own, plan))}
    for arm, places in arms.items():
        factors = memory(f"factors {places}", lambda places=places: every.run(places)[0])
        make = functools.partial(solver, levels=every.levels(places), factors=factors)
        values[arm] = judge(bench, memory, str(places), make)
    return {
        "computed": plan.computed_steps,
        "places": arms,
        "arms": {arm: figures_of(values, arm) for arm in values},
    }


def searched(
    places: Places, better: Better, name: str, settled: bool = False
) -> dict[str, Places]:
    """Levels moved by whole steps, and then by fractions; ``settled``: each until no move is better."""
    whole = moved(places, 1.0, better, settled)
    fine = whole
    for fraction in FRACTIONS:
        fine = moved(fine, fraction, better, settled)
    return {name + WHOLE: whole, name + QUARTERS: fine}


def moved(places: Places, by: float, better: Better, settled: bool) -> Places:
    """Each place but the first moved while that is better, the last first: runs for its moves are the shortest."""
    begun = places
    for index in reversed(range(1, len(places))):
        for step in (by, -by):
            before = places
            while better(
                other := (*places[:index], places[index] + step, *places[index + 1 :]), places
            ):
                places = other
            if places != before:
                break
    return moved(places, by, better, settled) if settled and places != begun else places


class OpenLoop:
    """What fitted factors miss on the uncached trajectories, for evaluations at any places, the end at step T.

    Latents and predictions between recorded steps are interpolated by cubics in the noise level.
    """

    def __init__(self, trajectories: Sequence[Trajectory], gains: np.ndarray) -> None:
        sigmas = trajectories[0].sigmas
        self._num_steps = len(sigmas) - 1
        self._count = int(self._num_steps / min(FRACTIONS)) + 1
        fine = np.linspace(0, self._num_steps, self._count)
        self._levels = np.interp(fine, np.arange(len(sigmas)), sigmas)
        self._gains = np.interp(fine, np.arange(len(sigmas)), gains)
        grams = []
        for own in trajectories:
            states = own.latents.reshape(len(sigmas), -1).astype(float)
            velocities = np.diff(states, axis=0) / np.diff(sigmas)[:, None]
            parts = [(sigmas[:-1], velocities), (sigmas, states)]
            both = np.vstack([_between(*part, self._levels) for part in parts])
            grams.append(both @ both.T)
        # Inner products of velocities, and behind them of latents, prompt by prompt.
        self._gram = np.array(grams)

    def better(self, places: Places, than: Places) -> bool:
        spans = np.diff([*places, self._num_steps])
        return min(spans) >= min(FRACTIONS) and self.score(places) > self.score(than)

    def score(self, places: Places) -> float:
        """Signal-to-noise ratio in dB that the errors of all ways would leave, if they were independent."""
        at = [round(place / min(FRACTIONS)) for place in (*places, self._num_steps)]
        gram, states = self._gram, self._count
        errors = np.zeros(len(gram))
        for index, (first, after) in enumerate(pairwise(at)):
            seen = at[: index + 1][::-1]
            distance = self._levels[after] - self._levels[first]
            grams = distance**2 * gram[:, seen][:, :, seen]
            products = distance * (
                gram[:, seen, states + after] - gram[:, seen, states + first]
            )
            ends = gram[:, [states + first, states + after]][
                :, :, [states + first, states + after]
            ]
            ways = ends[:, 0, 0] - 2 * ends[:, 0, 1] + ends[:, 1, 1]
            weights = np.array(
                solve(np.mean(grams.T / ways, axis=-1), np.mean(products.T / ways, axis=-1))
            )
            left = ways - 2 * products @ weights + grams @ weights @ weights
            errors += np.maximum(left, 0) * self._gains[after] ** 2
        return score(-10 * np.log10(errors / gram[:, -1, -1]))


def _between(sigmas: np.ndarray, values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return CubicSpline(sigmas[::-1], values[::-1])(levels)


class Memory:
    """Figures of one budget by name, in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.values = json.loads(file.read_text()) if file.exists() else {}

    def __call__(self, name: str, make: Callable[[], Any]) -> Any:
        """What the file has under this name; made and written now where it has nothing."""
        if name not in self.values:
            self.values[name] = make()
            write_json(self._file, self.values)
        return self.values[name]


def free(scheduler: Any, times: torch.Tensor, move: Callable[..., torch.Tensor]) -> Any:
    """A copy of a diffusers scheduler with these timesteps, whose step is ``move(prediction, latents)``."""
    own: Any = type(scheduler)

    class Free(own):
        @functools.wraps(own.set_timesteps)
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            own.set_timesteps(self, *args, **kwargs)
            self.timesteps = times

        def step(
            self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True
        ) -> tuple:
            return (move(model_output, sample),)

    Free.__name__ = own.__name__
    changed = copy.deepcopy(scheduler)
    changed.__class__ = Free
    return changed


def solver(scheduler: Any, levels: Sequence[float], factors: Factors) -> Any:
    """The scheduler that runs a solver of the form of `calibrate export --to solver` once."""
    predictions: list[torch.Tensor] = []

    def move(prediction: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        predictions.insert(0, prediction)
        return latents + combined(factors[len(predictions) - 1], predictions)

    return free(scheduler, time_of(scheduler, torch.tensor(levels)), move)


def time_of(scheduler: Any, level: Any) -> Any:
    """The timestep of a noise level of flow matching."""
    return level * scheduler.config.num_train_timesteps


def with_scheduler(pipeline: Any, scheduler: Any) -> Any:
    copied = copy.copy(pipeline)
    copied.scheduler = scheduler
    return copied


class Lockstep:
    """The solver on several prompts side by side, with evaluations at any places.

    Between recorded steps the uncached latents are interpolated by cubics in the noise level.

    Args:
        running: Generations whose scheduler returns the latents that it is given.
        times: The timestep at which they evaluate next, in each element.
    """

    def __init__(
        self, running: Sequence[Generation], own: Sequence[Trajectory], times: torch.Tensor
    ) -> None:
        self._running, self._trajectories, self._times = running, own, times
        self._sigmas = own[0].sigmas
        rising = self._sigmas[::-1]
        self._teachers = [CubicSpline(rising, states.latents[::-1]) for states in own]
        # Of the last run: places up to an evaluation -> latents there and predictions, prompt by prompt.
        self._known: dict[Places, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}

    def half(self, first: int) -> "Lockstep":
        """Every second prompt; recorded prompts come in groups of like wording."""
        return Lockstep(self._running[first::2], self._trajectories[first::2], self._times)

    @property
    def num_steps(self) -> int:
        return len(self._sigmas) - 1

    def levels(self, places: Sequence[float]) -> list[float]:
        return np.interp(places, np.arange(len(self._sigmas)), self._sigmas).tolist()

    def run(
        self, places: Places, factors: Factors | None = None
    ) -> tuple[Factors, list[float]]:
        """Factors, fitted on the way where none are given, and each prompt's signal-to-noise ratio in dB at the end.

        Evaluations that the run before made at the same places are not made again: their latents are the same.
        """
        known, self._known = self._known, {}
        latents = [torch.from_numpy(own.latents[0]) for own in self._trajectories]
        predictions: list[list[torch.Tensor]] = [[] for _ in latents]
        rows: Factors = []
        for index, (level, after) in enumerate(
            pairwise(self.levels([*places, self.num_steps]))
        ):
            until = places[: index + 1]
            if until not in known:
                known[until] = latents, self._evaluated(latents, level)
            latents, newest = self._known[until] = known[until]
            predictions = [
                [new, *older] for new, older in zip(newest, predictions, strict=True)
            ]
            targets = [torch.from_numpy(teacher(after)) for teacher in self._teachers]
            ways = [target - now for target, now in zip(targets, latents, strict=True)]
            rows.append(
                factors[index] if factors else fitted(ways, predictions, after - level)
            )
            latents = [
                now + combined(rows[-1], own)
                for now, own in zip(latents, predictions, strict=True)
            ]
        errors = [
            float((now - target).norm() / target.norm())
            for now, target in zip(latents, targets, strict=True)
        ]
        return rows, [-20 * float(np.log10(max(error, 1e-12))) for error in errors]

    def _evaluated(self, latents: Sequence[torch.Tensor], level: float) -> list[torch.Tensor]:
        predictions = []
        for generation, own in zip(self._running, latents, strict=True):
            if generation.call is None:
                generation.resume()
            self._times.fill_(time_of(generation.waiting.scheduler, level))
            generation.resume(latents=own)
            predictions.append(generation.waiting.prediction)
        return predictions


def fitted(
    ways: Sequence[torch.Tensor],
    predictions: Sequence[Sequence[torch.Tensor]],
    distance: float,
) -> list[float]:
    """Factors of the predictions that come nearest to the way of each prompt, as plans are fitted.

    A prompt counts by one over the square of its way; the ridge holds them at the step of Euler's method.
    """
    grams, products = [], []
    for way, own in zip(ways, predictions, strict=True):
        responses = (
            torch.stack([prediction.double().flatten() for prediction in own]) * distance
        )
        target = way.double().flatten()
        scale = float(target @ target)
        grams.append((responses @ responses.T).numpy() / scale)
        products.append((responses @ target).numpy() / scale)
    weights = solve(np.mean(grams, axis=0), np.mean(products, axis=0))
    return [weight * distance for weight in weights]


class Halves:
    """Runs of the half of the recorded prompts that fits the factors, and of the half that checks them."""

    def __init__(self, every: Lockstep, memory: Memory) -> None:
        self._memory, self._num_steps = memory, every.num_steps
        self._fitting, self._checking = every.half(0), every.half(1)

    def better(self, places: Places, than: Places) -> bool:
        """Whether both halves gain."""
        if min(np.diff([*places, self._num_steps])) < min(FRACTIONS):
            return False
        halves = (self._fitted, self._checked)
        return all(score(np.array(h(places))) > score(np.array(h(than))) for h in halves)

    def _fitted(self, places: Places) -> list[float]:
        return self._run(places)[1]

    def _checked(self, places: Places) -> list[float]:
        factors = self._run(places)[0]
        return self._memory(
            f"checked {places}", lambda: self._checking.run(places, factors)[1]
        )

    def _run(self, places: Places) -> tuple[Factors, list[float]]:
        return self._memory(f"fitted {places}", lambda: self._fitting.run(places))


def judge(bench: Bench, memory: Memory, name: str, make: Callable[[Any], Any]) -> list[float]:
    """PSNR of every judged prompt under the scheduler that ``make`` makes of the pipeline's own."""
    session = bench.case.session

    def value(prompt: Any) -> float:
        changed = with_scheduler(session.driver, make(session.driver.scheduler))
        sample = Sampler(session.driven_by(changed))(prompt)
        return compare_all(sample, bench.reference(prompt))["psnr_db"]

    return [
        memory(
            f"judged {name} {prompt.prompt_id} {prompt.seed}",
            functools.partial(value, prompt),
        )
        for prompt in bench.prompts.prompts
    ]


def figures_of(values: dict[str, list[float]], arm: str) -> dict[str, Any]:
    """Mean, worst prompt, and the paired gains over each arm before it with their 95 % intervals."""
    own = np.array(values[arm])
    earlier = [other for other in ARMS[: ARMS.index(arm)] if other in values]
    return {
        "mean": float(own.mean()),
        "worst": float(own.min()),
        "minus": {other: mean_interval(own - values[other]) for other in earlier},
    }


def markdown(found: dict[str, Any]) -> str:
    """Every kind of solver at every budget, and the gains paired by prompt."""
    budgets = found["budgets"]
    lines = [
        f"{found['model']}, {found['dtype']}, {found['recorded']} recorded and {found['prompts']} judged prompts",
        "",
        f"| evaluations instead of {found['steps']} | {' | '.join(str(b['computed']) for b in budgets)} |",
        "|---" * (len(budgets) + 1) + "|",
    ]
    for arm in ARMS:
        cells = [b["arms"].get(arm) for b in budgets]
        shown = ["-" if c is None else "{mean:.1f} ({worst:.1f})".format(**c) for c in cells]
        lines.append(f"| {arm} | {' | '.join(shown)} |")
    pairs = [(arm, PLAN) for arm in ARMS[1:]]
    pairs += [(name + QUARTERS, name + WHOLE) for name in (OPEN, CLOSED)]
    for arm, other in pairs:
        gains = [b["arms"].get(arm, {"minus": {}})["minus"].get(other) for b in budgets]
        shown = [
            "-" if g is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(*g) for g in gains
        ]
        lines.append(f"| {arm}, minus {other} | {' | '.join(shown)} |")
    return "\n".join(lines)


def say(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    main()
