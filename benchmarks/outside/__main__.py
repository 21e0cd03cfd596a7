"""Every policy on two trained models that nobody here trained, through the public functions for models of one's own.

    make outside
    python -m benchmarks.outside

Each model is recorded, fitted, planned and verified in a run folder under ``build/outside/``; the same command goes on
where it was cut off. Figures are the signal-to-noise ratio of the series against the uncached one, in dB.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import pandas as pd

import coeffs
from benchmarks.common import RESULTS, surroundings
from benchmarks.outside.models import FOLDER, wheel_sha256
from benchmarks.outside.sampling import (
    NUM_STEPS,
    Generator,
    load_generator,
    prompts,
    wind_generator,
)
from calibrate import fit, plan, record, verify
from calibrate.trials.setting import FEWER_STEPS
from calibrate.verifying.comparison import mean_interval
from runtime import OwnLoop

MEASURE = "snr_db"
NEAR = (
    1.5  # steps that a gate may compute more or fewer than the budget and still be compared there
)


@dataclass(frozen=True)
class Study:
    """How much of a model is run; no prompt has two purposes.

    Attributes:
        recorded, choosing, planned, judged: Prompts to fit by, to choose plans by, to judge plans by, to verify by.
    """

    make: Callable[[], Generator]
    budgets: tuple[int, ...]
    recorded: int
    choosing: int
    planned: int
    judged: int


STUDIES = {
    "load": Study(load_generator, (25, 15, 10, 7), recorded=20, choosing=12, planned=12, judged=48),
    # A generation takes seconds here: 100 calls over 289 tokens.
    "wind": Study(wind_generator, (25, 15, 10), recorded=8, choosing=2, planned=2, judged=8),
}


@click.command()
@click.option("--only", type=click.Choice([*STUDIES]), help="One model only.")
@click.option("--seed", default=0, show_default=True, help="Of the prompts.")
@click.option("--shown", is_flag=True, help="Print the stored results again; run nothing.")
def main(only: str | None, seed: int, shown: bool) -> None:
    """Print the tables of both models."""
    for name in [only] if only else STUDIES:
        path = RESULTS / f"outside-{name}.json"
        if not shown:
            found = run(STUDIES[name], FOLDER / f"run-{name}-{seed}", seed)
            path.write_text(json.dumps({"surroundings": surroundings(), **found}, indent=1) + "\n")
        click.echo(f"\n{markdown(json.loads(path.read_text()))}")


def run(study: Study, folder: Path, seed: int) -> dict:
    """Record, fit, plan and verify; the figures of every policy, budget and prompt."""
    generate = study.make()
    loop = OwnLoop(generate.model, generate.scheduler)
    own = {"generate": generate, "modules": loop}
    planning = study.choosing + study.planned
    texts = prompts(generate.model, study.recorded + planning + study.judged, seed)
    to_plan = texts[study.recorded : study.recorded + planning]
    recorded = texts[: study.recorded]
    record(generate.name, prompts=recorded, steps=NUM_STEPS, out=folder, gram=True, **own)
    if not (folder / "entry.yaml").exists():
        coeffs.save(fit(folder), folder / "entry.yaml")
    if not coeffs.load(folder / "entry.yaml").plans:
        plan(
            folder,
            computed=study.budgets,
            prompts=to_plan,
            choosing=study.choosing,
            num_prompts=study.planned,
            say=_say,
            **own,
        )
    found = verify(
        folder,
        prompts=texts[study.recorded + planning :],
        num_prompts=study.judged,
        budgets=study.budgets,
        say=_say,
        **own,
    )
    columns = ["policy", "budget", "prompt_id", "computed_steps", MEASURE, "rel_l2"]
    plans = coeffs.load(folder / "entry.yaml").plans or ()
    return {
        "model": generate.name,
        "wheel_sha256": wheel_sha256(),
        "parameters": sum(parameter.numel() for parameter in generate.model.parameters()),
        "steps": NUM_STEPS,
        "prompts": {"recorded": study.recorded, "planned by": planning, "judged": study.judged},
        "refused": found.facts["refused"],
        "schedules": {plan.schedule.count("C"): plan.schedule for plan in plans},
        "rows": found.results[columns].round(4).to_dict("records"),
    }


def _say(text: str) -> None:
    click.echo(text, err=True)


def markdown(found: dict) -> str:
    """Mean and worst prompt of every policy at every budget; below, the paired difference from fewer steps."""
    rows = pd.DataFrame(found["rows"])
    budgets = sorted(rows["budget"].unique(), reverse=True)
    header = f"| computed of {found['steps']} | {' | '.join(map(str, budgets))} |"
    rule = "|---" * (len(budgets) + 1) + "|"
    levels, differences = [], []
    for policy in rows["policy"].unique():
        cells = [_level(rows, policy, budget) for budget in budgets]
        levels.append(f"| {policy} | {' | '.join(cells)} |")
        if policy != FEWER_STEPS:
            cells = [_difference(rows, policy, budget) for budget in budgets]
            differences.append(f"| {policy} | {' | '.join(cells)} |")
    title = f"{found['model']}, {found['prompts']['judged']} prompts"
    return "\n".join([
        f"{title}: SNR in dB, mean (worst prompt)", "", header, rule, *levels, "",
        f"{title}: minus {FEWER_STEPS}, dB, paired by prompt, with the 95 % interval of the mean",
        "", header, rule, *differences,
    ])  # fmt: skip


def _level(rows: pd.DataFrame, policy: str, budget: int) -> str:
    chosen = _at(rows, policy, budget)
    if chosen.empty:
        return ""
    steps = chosen["computed_steps"].mean()
    text = f"{chosen[MEASURE].mean():.1f} ({chosen[MEASURE].min():.1f})"
    return text if abs(steps - budget) < 0.05 else f"{text} at {steps:.1f}"


def _difference(rows: pd.DataFrame, policy: str, budget: int) -> str:
    ours, theirs = (_at(rows, name, budget) for name in (policy, FEWER_STEPS))
    if ours.empty or abs(ours["computed_steps"].mean() - budget) > NEAR:
        return ""
    paired = ours.set_index("prompt_id")[MEASURE] - theirs.set_index("prompt_id")[MEASURE]
    mean, low, high = mean_interval(paired.to_numpy())
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _at(rows: pd.DataFrame, policy: str, budget: int) -> pd.DataFrame:
    return rows[(rows["policy"] == policy) & (rows["budget"] == budget)]


if __name__ == "__main__":
    main()
