"""Every export of every entry, fed to the engines' own parsers from their published wheels.

    python -m benchmarks.engines.check [--folder FOLDER]

Downloads the named releases without dependencies into FOLDER, outside the checkout, and prints the table of
docs/registry.md. Exit code 1 if a parser refuses an export, would run another plan than was exported, or an engine
cannot wrap a class that we export to it.
"""

import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

import coeffs
from benchmarks.engines import parsers
from benchmarks.engines.adapters import refused_classes
from coeffs.engines import export_entry
from coeffs.engines.plans import wants_plan
from coeffs.engines.releases import plan_forms, releases
from coeffs.errors import CoeffsError

THRESHOLD = 0.2  # where an entry has several thresholds or none
STEPS = 28  # of the plan for an entry that has none and does not state its steps


@dataclass(frozen=True)
class Package:
    """What to download for a form, and the engine's parser in it."""

    requirement: str | None
    parser: Callable[[Path], parsers.Parser]


FORMS = {
    "vllm-omni": Package("vllm-omni", parsers.vllm_omni),
    "vllm-omni-magcache": Package("vllm-omni", parsers.vllm_omni_magcache),
    "sglang": Package("sglang", parsers.sglang),
    "sglang-cache-dit": Package("sglang", parsers.sglang_cache_dit),
    "mlx-teacache": Package("mlx-teacache", parsers.mlx_teacache),
    "cache-dit-mask": Package(None, parsers.cache_dit_mask),
    "xfuser": Package("xfuser", parsers.xfuser),
    "angelslim": Package("angelslim", parsers.angelslim),
    "diffusers-magcache": Package(None, parsers.diffusers_magcache),
}
NOT_VERIFIABLE = {
    "tensorrt-llm": "no wheel without CUDA; read from the repository",
    "lightx2v": "not on the package index; read from the repository",
    "lightx2v-magcache": "not on the package index; read from the repository",
    "comfyui-teacache": "a node without a parser; read from the repository",
}


def exports(form: str) -> Iterator[tuple[str, str | None]]:
    """What is exported, as text and schedule (None for coefficients and recorded ratios); no refusals."""
    for entry in coeffs.entries():
        for schedule in _schedules(form, entry):
            is_plan = form in plan_forms() and (
                not form.endswith("magcache") or wants_plan(entry, schedule)
            )
            try:
                text = export_entry(
                    entry, form, threshold=_threshold(entry), schedule=schedule
                )
            except CoeffsError:
                continue
            yield text, schedule if is_plan else None


def _schedules(form: str, entry: coeffs.Entry) -> list[str | None]:
    if form not in plan_forms():
        return [None]
    every_second = ("CS" * STEPS)[: entry.protocol.num_steps or STEPS]
    own = [plan.schedule for plan in entry.plans or ()] or [every_second]
    return [*own, None] if form.endswith("magcache") else list(own)


def _threshold(entry: coeffs.Entry) -> float:
    known = {row.threshold for row in entry.thresholds}
    return known.pop() if len(known) == 1 else THRESHOLD


def downloaded(requirement: str, folder: Path) -> Path:
    """The unpacked wheel of a release."""
    target = folder / requirement.replace("==", "-")
    if not target.exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--quiet",
            "--dest",
            str(folder),
        ]
        before = set(folder.glob("*.whl"))
        subprocess.run([*command, requirement], check=True)
        name = requirement.partition("==")[0].replace("-", "_")
        wheels = [path for path in folder.glob("*.whl") if path.name.lower().startswith(name)]
        with zipfile.ZipFile(max(wheels, key=lambda path: path not in before)) as wheel:
            wheel.extractall(target)
    return target


def checked(form: str, folder: Path) -> tuple[str, list[str]]:
    """The form's line of the table, and what went wrong."""
    release = releases()[form]
    if form in NOT_VERIFIABLE:
        count = sum(1 for _ in exports(form))
        return (
            f"| `{form}` | {release.release} | {count} exported; {NOT_VERIFIABLE[form]} | |",
            [],
        )
    package = FORMS[form]
    root = folder
    if package.requirement is not None:
        root = downloaded(f"{package.requirement}=={release.version}", folder)
    parse = package.parser(root)
    accepted = equal = plans = count = 0
    wrong = [*refused_classes(root)] if form == "sglang-cache-dit" else []
    for text, schedule in exports(form):
        count += 1
        plans += schedule is not None
        try:
            steps = parse(text)
        except (
            Exception
        ) as error:  # whatever the engine raises for a text that it does not accept
            wrong.append(f"{form}: {type(error).__name__}: {error}: {text.splitlines()[0]}")
            continue
        accepted += 1
        if schedule is not None and steps == [int(letter == "C") for letter in schedule]:
            equal += 1
        elif schedule is not None:
            wrong.append(f"{form}: runs {steps}, exported was {schedule}")
    executed = f"{equal} of {plans}" if plans else ""
    return f"| `{form}` | {release.release} | {accepted} of {count} | {executed} |", wrong


@click.command()
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path.home() / ".cache" / "teacal" / "engines",
    show_default=True,
    help="Where the releases are downloaded to.",
)
def main(folder: Path) -> None:
    """Feed every export of every entry to the engines' own parsers."""
    folder.mkdir(parents=True, exist_ok=True)
    problems = []
    click.echo(
        "| form | release | accepted by its parser | executed pattern equal |\n| --- | --- | --- | --- |"
    )
    for form in releases():
        line, wrong = checked(form, folder)
        click.echo(line)
        problems += wrong
    for problem in problems:
        click.echo(problem, err=True)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
