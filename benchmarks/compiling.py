"""Eager, compiled, and compiled with a cache, in one run.

python -m benchmarks.compiling [--shape NAME] [--rounds N]
"""

from collections.abc import Callable
from typing import Any

import click

from benchmarks.common import alternate, ratio, table, write
from benchmarks.workloads import Shape, build, chosen, generate
from runtime import apply_tea_cache, compile_blocks


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    eager, compiled = build(shape), build(shape)
    compile_blocks(compiled)
    half = "".join("CS"[index % 2] for index in range(shape.steps))

    def with_cache(model: Any) -> Callable[[], None]:
        def run() -> None:
            with apply_tea_cache(model, schedule=half):
                generate(model, shape)

        return run

    cases = {
        "eager": lambda: generate(eager, shape),
        "eager, half skipped": with_cache(eager),
        "compiled": lambda: generate(compiled, shape),
        "compiled, half skipped": with_cache(compiled),
    }
    seconds = alternate(cases, rounds)
    return {
        "shape": shape.title,
        "seconds": seconds,
        "over_eager": {name: ratio(seconds, name, "eager") for name in cases if name != "eager"},
    }


@click.command()
@click.option("--shape", "name", help="One shape only (default: all that fit this machine).")
@click.option("--rounds", default=3, show_default=True)
def main(name: str | None, rounds: int) -> None:
    """Compiled blocks with and without a cache."""
    found = [measure(shape, rounds) for shape in chosen(name).values()]
    for case in found:
        click.echo(case["shape"])
        rows = [
            [label, figures["median"], 1 / figures["median"]]
            for label, figures in case["over_eager"].items()
        ]
        click.echo(table(["case", "time/eager", "speed-up"], rows) + "\n")
    click.echo(f"{write('compiling', {'cases': found})}")


if __name__ == "__main__":
    main()
