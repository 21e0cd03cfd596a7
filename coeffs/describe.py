"""Entries as tables and text: for `calibrate list` and `show`."""

import csv
import io
import itertools
import json
import textwrap
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Any

from coeffs.entry.fields import Text, plain, stated
from coeffs.entry.schema import Candidate, Entry, Expert, Threshold
from coeffs.entry.strict_yaml import Plain

WIDTH = 100
_names = attrgetter("model", "title", "checkpoint.repository", "transformer_class")
COLUMNS = (
    "entry",
    "status",
    "engine",
    "model",
    "class",
    "signal",
    "degree",
    "steps",
    "r2_held_out",
    "thresholds",
)
_THRESHOLD_COLUMNS = {
    "threshold": "threshold",
    "kind": "kind",
    "steps": "computed",
    "speedup": "speed-up",
    "psnr_db": "PSNR dB",
    "worst_psnr_db": "worst dB",
    "snr_db": "SNR dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "latent_rel_l2": "latent L2",
}


# --- many entries ---------------------------------------------------------------------------------


def row(entry: Entry, shown_thresholds: int = 4) -> Plain:
    """The facts of an entry that a list shows; thresholds with their speed-up."""
    fits = [fit for expert in entry.experts.values() for fit in expert.branches.values()]
    figures = (fits and fits[0].figures) or {}
    thresholds = [
        f"{stated.threshold:g}" + (f" ({stated.speedup:.3g}x)" if stated.speedup else "")
        for stated in entry.thresholds
    ]
    if len(thresholds) > shown_thresholds:
        thresholds[shown_thresholds:] = ["..."]
    values = (
        entry.label,
        entry.origin,
        entry.engine,
        entry.title or entry.checkpoint.repository,
        entry.transformer_class,
        entry.signal,
        max((fit.degree for fit in fits), default=None),
        entry.protocol.num_steps,
        figures.get("r2_held_out"),
        ", ".join(thresholds),
    )
    return dict(zip(COLUMNS, values, strict=True))


def matching(
    entries: Iterable[Entry], *, model: Text, engine: Text, status: Text
) -> list[Entry]:
    """Entries of one engine, of one status, whose name, title, checkpoint or class has ``model``."""
    selected = []
    for entry in entries:
        named = (model or "").lower() in " ".join(filter(None, _names(entry))).lower()
        if named and engine in (None, entry.engine) and status in (None, entry.status):
            selected.append(entry)
    return selected


def as_json(entries: Iterable[Entry]) -> str:
    """Complete entries, for programs."""
    return json.dumps([plain(entry) for entry in entries], indent=2, ensure_ascii=False)


def as_csv(entries: Iterable[Entry]) -> str:
    """The rows of the list as CSV."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(row, entries))
    return stream.getvalue().rstrip("\n")


def as_table(entries: Iterable[Entry], width: int = WIDTH) -> str:
    """The list for a terminal: an entry a line at 100 columns."""
    shown = ("entry", "status", "steps", "r2_held_out", "thresholds")
    rows = []
    for entry in entries:
        facts = row(entry, shown_thresholds=2) | {"status": entry.status}
        rows.append([facts[column] for column in shown])
    return columns(shown, rows, width)


def columns(head: Iterable[str], rows: Iterable[Iterable[Any]], width: int = WIDTH) -> str:
    """Left-aligned columns within ``width``; ``None`` is blank, long cells go over several lines."""
    cells = [list(map(cell, values)) for values in (head, *rows)]
    widths = [max(1, *map(len, column)) for column in zip(*cells, strict=True)]
    while sum(widths) + 2 * len(widths) - 2 > width and max(widths) > 12:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for texts in cells:
        wrapped = map(textwrap.wrap, texts, widths)
        for parts in itertools.zip_longest(*wrapped, fillvalue=""):
            lines.append("  ".join(map(str.ljust, parts, widths)).rstrip())
    return "\n".join(lines)


def cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- one entry ------------------------------------------------------------------------------------


def described(entry: Entry, width: int = WIDTH) -> str:
    """An entry for a reader: origin, protocol, polynomials and figures, thresholds, warnings."""
    lines = [entry.label]
    for name, text in _facts(entry).items():
        if text:
            lines += _wrapped(f"{name + ':':<12}{text}", width, 12)
    for name, expert in entry.experts.items():
        lines += _expert_lines(name, expert, width)
    if entry.thresholds:
        lines += _threshold_lines(entry.thresholds, width)
    for plan in entry.plans or ():
        lines.append(f"plan: {plan.schedule} ({plan.computed_steps} computed)")
    for certificate in entry.certificates:
        lines += _wrapped(f"certified: {certificate.promise}", width, 2)
    for warning in entry.warnings:
        lines += _wrapped(f"warning: {warning}", width, 9)
    return "\n".join(lines)


def _facts(entry: Entry) -> dict[str, Text]:
    checkpoint = (entry.checkpoint.repository, entry.checkpoint.revision)
    return {
        "status": entry.origin,
        "model": entry.title or entry.checkpoint.repository,
        "checkpoint": "@".join(filter(None, checkpoint)),
        "class": entry.transformer_class,
        "signal": " - ".join(filter(None, (entry.signal, entry.signal_note))),
        "target": entry.target,
        "sign rule": entry.sign_rule,
        "protocol": _pairs(vars(entry.protocol) | {"call_arguments": None}),
        "window": _pairs(
            {name: getattr(entry, name) for name in ("start", "end", "max_skips")}
        ),
        "source": entry.source.reference or _pairs(vars(entry.source)),
        "notes": entry.notes,
    }


def _expert_lines(name: str, expert: Expert, width: int) -> Iterator[str]:
    for branch, fit in expert.branches.items():
        mark = (
            ", recommended"
            if branch == expert.recommended and len(expert.branches) > 1
            else ""
        )
        yield f"\n{name}/{branch} (degree {fit.degree}, {fit.method}{mark})"
        polynomial = " ".join(
            f"{value:+.6g} x^{fit.degree - place}".removesuffix(" x^0")
            for place, value in enumerate(fit.coefficients_high_to_low)
        )
        counts = _pairs(plain(fit.counts))
        texts = (polynomial, f"domain {span_of(fit)}", counts, _pairs(fit.figures), fit.why)
        for text in filter(None, texts):
            yield from _wrapped(f"  {text}", width, 2)
    for branch, ratios in (expert.mag_ratios or {}).items():
        span = f"{min(ratios):.4g} to {max(ratios):.4g}"
        yield f"{name}/{branch}: {len(ratios)} magnitude ratios, {span}"


def _threshold_lines(thresholds: Iterable[Threshold], width: int) -> Iterator[str]:
    rows = []
    notes: dict[str, list[str]] = {}
    for threshold in thresholds:
        of = f" of {threshold.num_steps}" if threshold.num_steps else ""
        steps = (
            None
            if threshold.computed_steps is None
            else f"{threshold.computed_steps:.4g}{of}"
        )
        rows.append(vars(threshold) | {"steps": steps})
        note = "; ".join(filter(None, (threshold.hardware, threshold.note)))
        if note:
            notes.setdefault(f"{threshold.kind}: {note}", []).append(
                cell(threshold.threshold)
            )
    shown = [
        name for name in _THRESHOLD_COLUMNS if any(row[name] is not None for row in rows)
    ]
    head = [_THRESHOLD_COLUMNS[name] for name in shown]
    yield "\n" + columns(head, [[row[name] for name in shown] for row in rows], width)
    for note, values in notes.items():
        yield from _wrapped(f"threshold {', '.join(values)} {note}", width, 2)


def _wrapped(text: str, width: int, indent: int) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def span_of(fit: Candidate) -> str:
    return f"{fit.domain[0]:.4g} to {fit.domain[1]:.4g}" if fit.domain else "not published"


def _pairs(values: Plain | None) -> str:
    known = stated(values or {}).items()
    return ", ".join(f"{name} {cell(value)}" for name, value in known)
