"""Every policy on two trained models that nobody here trained, through the public functions for models of one's own.

    make outside
    python -m benchmarks.outside

Each model is recorded, fitted, planned and verified in a run folder under ``build/outside/``; the same command goes on
where it was cut off. Figures are the signal-to-noise ratio of the series against the uncached one, in dB.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from benchmarks.common import RESULTS, surroundings
from benchmarks.outside.models import FOLDER, wheel_sha256
from benchmarks.outside.sampling import (
    NUM_STEPS,
    Generator,
    load_generator,
    prompts,
    wind_generator,
)
from benchmarks.study import Study, carry_out, tables
from runtime import OwnLoop

MODELS: dict[str, Callable[[], Generator]] = {
    "load": load_generator,
    "wind": wind_generator,
}
# BudCache's search takes some hundred generations a budget: minutes of the load model, hours of the other.
POLICIES = {"load": ("all", "budcache"), "wind": ("all",)}
STUDIES = {
    "load": Study(
        NUM_STEPS, (25, 15, 10, 7, 5), recorded=20, choosing=12, planned=12, judged=48
    ),
    # A generation takes seconds here: 100 calls over 289 tokens.
    "wind": Study(NUM_STEPS, (25, 15, 10, 5), recorded=8, choosing=2, planned=2, judged=8),
}
# Minutes on a CPU: shows that everything runs, on too few prompts for figures.
QUICK = {
    "load": Study(NUM_STEPS, (15, 7), recorded=4, choosing=1, planned=1, judged=4),
    "wind": Study(NUM_STEPS, (7,), recorded=2, choosing=1, planned=1, judged=3),
}


@click.command()
@click.option("--only", type=click.Choice([*STUDIES]), help="One model only.")
@click.option("--seed", default=0, show_default=True, help="Of the prompts.")
@click.option("--shown", is_flag=True, help="Print the stored results again; run nothing.")
@click.option(
    "--quick", is_flag=True, help="Few prompts and budgets; results in build/outside."
)
def main(only: str | None, seed: int, shown: bool, quick: bool) -> None:
    """Print the tables of both models."""
    for name in [only] if only else STUDIES:
        label = f"{name}-quick" if quick else name
        path = (FOLDER if quick else RESULTS) / f"outside-{label}.json"
        if not shown:
            study = (QUICK if quick else STUDIES)[name]
            folder = FOLDER / f"run-{label}-{seed}"
            figures = run(MODELS[name](), study, folder, seed, POLICIES[name])
            content = {"surroundings": surroundings(), **figures}
            path.write_text(json.dumps(content, indent=1) + "\n")
        # Results from before the measure was stored with them are of series too.
        figures = {"measure": "snr_db"} | json.loads(path.read_text())
        click.echo(f"\n{tables(figures['model'], figures)}")


def run(
    generate: Generator, study: Study, folder: Path, seed: int, policies: Sequence[str]
) -> dict:
    """The figures of every policy, budget and prompt, and what model they are of."""
    loop = OwnLoop(generate.model, generate.scheduler)
    texts = prompts(generate.model, study.num_prompts, seed)
    own = {"generate": generate, "modules": loop}
    return {
        "model": generate.name,
        "wheel_sha256": wheel_sha256(),
        "parameters": sum(parameter.numel() for parameter in generate.model.parameters()),
        **carry_out(study, folder, generate.name, texts, own, policies),
    }


if __name__ == "__main__":
    main()
