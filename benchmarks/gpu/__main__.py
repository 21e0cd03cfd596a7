"""Fill the rows of docs/performance.md on the machine at hand: no network, no weights, one command.

    python -m benchmarks.gpu --minutes 20

Without a GPU one scaled model runs on the CPU instead of the four at full size.

Cases run in the order of their worth, each writes its row when it is done, and the same command continues where a
run was cut off. A case that fails (too little memory, a class that a compiler refuses) leaves its error as a row.
The last cases train two small models and plan them in bfloat16, some minutes each; what they have reached lies in
``build/gpu/``.
"""

import gc
import logging
import time
from pathlib import Path

import click
import torch

from benchmarks.common import RESULTS
from benchmarks.gpu.cases import Case, all_cases
from benchmarks.gpu.store import Store
from benchmarks.gpu.tables import markdown


@click.command()
@click.option("--minutes", default=20.0, show_default=True, help="No case begins after them.")
@click.option("--rounds", default=3, show_default=True, help="Of every case, in turn.")
@click.option(
    "--only", help="Cases whose name begins so, such as applying/ or recording/qwen."
)
@click.option("--toy", is_flag=True, help="Tiny models, to see that every case runs.")
@click.option("--out", type=click.Path(path_type=Path), help="Result file.")
def main(minutes: float, rounds: int, only: str | None, toy: bool, out: Path | None) -> None:
    """Measure what is missing and print the tables."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        click.echo("torch sees no GPU: these are figures of the CPU", err=True)
        if not toy:
            click.echo(
                "planning/ is left out: its models take hours to train on a CPU", err=True
            )
    logging.basicConfig(format="%(message)s")
    logging.getLogger("training").setLevel(logging.INFO)
    path = (
        out
        or RESULTS / f"performance-{'gpu' if on_gpu else 'cpu'}{'-toy' if toy else ''}.json"
    )
    store = Store(path)
    deadline = time.monotonic() + 60 * minutes
    missing = [
        case
        for case in all_cases(toy)
        if not store.is_done(case.name) and case.name.startswith(only or "")
    ]
    for count, case in enumerate(missing):
        if time.monotonic() > deadline:
            left = len(missing) - count
            click.echo(f"time is up; the same command goes on with {left} cases", err=True)
            break
        click.echo(case.name, err=True)
        store.add(case.name, _row(case, rounds, toy))
    click.echo(markdown(store.rows))
    click.echo(f"{path}", err=True)


def _row(case: Case, rounds: int, toy: bool) -> dict:
    begun = time.monotonic()
    try:
        row = case.run(rounds, toy)
    except Exception as error:  # one case's failure must not cost the others
        row = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        click.echo(f"{case.name} failed: {row['failed']}", err=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return row | {"took_seconds": time.monotonic() - begun}


if __name__ == "__main__":
    main()
