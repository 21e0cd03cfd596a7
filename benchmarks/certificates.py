"""How often a certificate is false, and what the guarantee costs: the table of docs/certificates.md.

    python -m benchmarks.certificates runs/x benchmarks/results/outside-load.json --draws 2000

Takes the figures that runs have kept of every prompt, for every policy at every budget, as the whole population: its
shares of misses are then known. It draws prompts from it 2,000 times, certifies from each draw as `calibrate certify`
does, and counts the draws in which some certificate is false. The oracle knows the population and takes the fewest
computed steps that keep the promise.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmarks.common import table
from calibrate.certifying.tiers import Demand
from calibrate.fitting.statistics import share_interval
from calibrate.trials.measures import capped, main_measure
from calibrate.trials.setting import FEWER_STEPS, GATE, PLAN

Population = Mapping[str, NDArray[np.float64]]
STEPS_OUTSIDE = 50  # of the third-party models, see benchmarks.outside
POLICIES = (PLAN, GATE, FEWER_STEPS)  # what `calibrate certify` tests
QUANTILES = (0.03, 0.1, 0.3)  # of all figures: an easy limit, a middle one, a strict one


@dataclass(frozen=True)
class Simulated:
    """What certifying from many draws of a population gave.

    Attributes:
        false: Draws in which a certificate was false.
        certified: Share of draws with a certificate, per limit.
        steps: Mean computed steps of the fastest certified setting (all steps where there is none), per limit.
        oracle: The fewest that keep the promise, per limit.
    """

    demand: Demand
    prompts: int
    draws: int
    false: int
    certified: list[float]
    steps: list[float]
    oracle: list[float]


def population(source: Path) -> tuple[str, pd.DataFrame]:
    """The main measure and the results that a run or a file of ``benchmarks.outside`` kept."""
    if source.is_dir():
        text = (source / "verify" / "results.jsonl").read_text(encoding="utf-8")
        rows = pd.DataFrame(json.loads(line)["row"] for line in text.splitlines() if line)
    else:
        rows = pd.DataFrame(json.loads(source.read_text(encoding="utf-8"))["rows"])
        rows = rows.assign(identical=False, broken=False, num_steps=STEPS_OUTSIDE)
    measure = main_measure(rows)
    return measure, rows.assign(figure=capped(rows, measure))


def figures_of(
    rows: pd.DataFrame, policies: tuple[str, ...] = POLICIES
) -> tuple[Population, Population]:
    """Figures (prompts x settings, the most computed steps first) and computed steps of each policy."""
    rows = rows[rows["policy"].isin(policies)]
    ran = rows.groupby("prompt_id")["policy"].nunique()
    rows = rows[rows["prompt_id"].isin(ran[ran == rows["policy"].nunique()].index)]
    figures, steps = {}, {}
    for policy, own in rows.groupby("policy"):
        wide = own.pivot_table("figure", "prompt_id", "budget", aggfunc="min").dropna(axis=1)
        wide = wide[sorted(wide.columns, reverse=True)]
        figures[policy] = wide.to_numpy()
        computed = own.groupby("budget")["computed_steps"].mean()
        steps[policy] = computed[wide.columns].to_numpy()
    return figures, steps


def simulate(
    figures: Population,
    steps: Population,
    limits: NDArray[np.float64],
    demand: Demand,
    prompts: int,
    draws: int,
    num_steps: int,
    seed: int = 0,
    allowed: int | None = None,
) -> Simulated:
    """Certify from many draws of ``prompts`` prompts; ``allowed`` misses instead of those that prove the risk."""
    random = np.random.default_rng(seed)
    population_size = len(next(iter(figures.values())))
    drawn = random.integers(population_size, size=(draws, prompts))
    allowed = demand.most_missed(prompts) if allowed is None else allowed
    fastest = np.full((len(limits), draws), np.inf)
    oracle = np.full(len(limits), np.inf)
    false = np.zeros(draws, bool)
    for policy, values in figures.items():
        for row, limit in enumerate(limits):
            missed = values < limit
            share = missed.mean(axis=0)
            passed = np.cumprod(missed[drawn].sum(axis=1) <= allowed, axis=1).sum(axis=1)
            some = passed > 0
            last = passed[some] - 1
            false[some] |= share[last] > demand.risk
            fastest[row, some] = np.minimum(fastest[row, some], steps[policy][last])
            good = steps[policy][share <= demand.risk]
            oracle[row] = min([oracle[row], *good])
    return Simulated(
        demand,
        prompts,
        draws,
        int(false.sum()),
        np.isfinite(fastest).mean(axis=1).tolist(),
        np.where(np.isfinite(fastest), fastest, num_steps).mean(axis=1).tolist(),
        np.where(np.isfinite(oracle), oracle, num_steps).tolist(),
    )


def lines(
    name: str, simulated: Simulated, limits: NDArray[np.float64]
) -> Iterator[list[object]]:
    share, low, high = share_interval(simulated.false, simulated.draws)
    for row, limit in enumerate(limits):
        yield [
            name,
            simulated.demand.risk,
            simulated.prompts,
            float(limit),
            f"{share:.2%} ({low:.2%} to {high:.2%})",
            f"{simulated.certified[row]:.0%}",
            simulated.steps[row],
            simulated.oracle[row],
            f"{1 - simulated.oracle[row] / simulated.steps[row]:.0%}",
        ]


@click.command()
@click.argument(
    "sources", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path)
)
@click.option("--draws", default=2000, show_default=True)
@click.option(
    "--risk", "risks", type=float, multiple=True, default=(0.05, 0.2), show_default=True
)
@click.option("--confidence", default=0.95, show_default=True)
@click.option("--policy", "policies", multiple=True, default=POLICIES, show_default=True)
@click.option(
    "--more", default=2.0, show_default=True, help="Times the prompts that are needed."
)
def main(
    sources: tuple[Path, ...],
    draws: int,
    risks: tuple[float, ...],
    confidence: float,
    policies: tuple[str, ...],
    more: float,
) -> None:
    """Simulate certification on recorded figures; exits 1 if the promise is broken too often."""
    rows, broken = [], []
    for source in sources:
        _, results = population(source)
        figures, steps = figures_of(results, policies)
        num_steps = int(results["num_steps"].iloc[0])
        everything = np.concatenate([values.ravel() for values in figures.values()])
        limits = np.quantile(everything, QUANTILES)
        for risk in risks:
            demand = Demand(risk, confidence, len(figures) * len(limits))
            prompts = int(more * demand.prompts_needed)
            simulated = simulate(figures, steps, limits, demand, prompts, draws, num_steps)
            rows += lines(source.stem, simulated, limits)
            broken.append(share_interval(simulated.false, draws)[1] > 1 - confidence)
    heads = [
        "population",
        "risk",
        "prompts",
        "limit dB",
        "false (95 % interval)",
        "certified",
    ]
    click.echo(table([*heads, "steps", "oracle", "speed lost"], rows))
    sys.exit(int(any(broken)))


if __name__ == "__main__":
    main()
