"""docs/registry.md: the table of entries is the registry's, the fields and commands are the real ones."""

import dataclasses
import os
import re
from pathlib import Path

import coeffs
from calibrate.commands.registry import COMMANDS, ENGINES
from coeffs import describe as tables
from coeffs import engines, store
from coeffs.entry import schema
from coeffs.entry.strict_yaml import MAX_BYTES, MAX_DEPTH, MAX_VALUES

PAGE = Path(__file__).parents[2] / "docs" / "registry.md"
BLOCK = re.compile(
    r"(?<=<!-- entries: generated, do not edit -->\n).*?(?=<!-- end of entries -->)",
    re.DOTALL,
)


def shipped() -> list[coeffs.Entry]:
    layer = store.Layer("shipped", store.SHIPPED)
    return [item.entry() for item in store.released() if item.layer == layer]


def as_markdown(entries: list[coeffs.Entry]) -> str:
    shown = [column for column in tables.COLUMNS if column not in ("engine", "class")]
    rows = [[tables.cell(tables.row(entry)[column]) for column in shown] for entry in entries]
    lines = [f"| {' | '.join(cells)} |" for cells in [shown, *rows]]
    return "\n".join([lines[0], f"|{' --- |' * len(shown)}", *lines[1:]])


def test_the_table_of_entries_is_current():
    """Regenerate with TEACAL_UPDATE=1 after a release."""
    text = PAGE.read_text(encoding="utf-8")
    current = BLOCK.sub(lambda _: "\n" + as_markdown(shipped()) + "\n\n", text)
    if os.environ.get("TEACAL_UPDATE"):
        PAGE.write_text(current, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == current


def test_every_field_is_explained():
    text = PAGE.read_text(encoding="utf-8")
    records = (
        schema.Entry,
        schema.Checkpoint,
        schema.Protocol,
        schema.Fit,
        schema.Expert,
        schema.Threshold,
        schema.Plan,
        coeffs.Certificate,
    )
    names = {
        field.name
        for record in (*records, schema.Source)
        for field in dataclasses.fields(record)
    }
    assert {
        name for name in names if f"`{name}`" not in text and f"{name}:" not in text
    } == set()


def test_commands_engines_and_limits_are_the_real_ones():
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"calibrate {command.name}" in text for command in COMMANDS)
    assert tuple(ENGINES.choices) == tuple(engines.ENGINES)
    assert all(f"| `{engine}` |" in text for engine in engines.ENGINES)
    assert (
        f"{MAX_BYTES // 1024} KiB, {MAX_VALUES:,} values or {MAX_DEPTH} levels"
        in text.replace("\n", " ")
    )
