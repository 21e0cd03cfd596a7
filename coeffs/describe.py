"""Entries as tables and text: what `calibrate list`, `show` and `diff` print and the documentation holds."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from coeffs.entry.fields import plain
from coeffs.entry.polynomial import Polynomial
from coeffs.entry.schema import Candidate, Entry

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
DISAGREEMENT = 0.25
POINTS = 11


def row(entry: Entry) -> dict[str, Any]:
    """The facts of one entry that a list shows; thresholds with the reported or measured speed-up."""
    fits = [fit for expert in entry.experts.values() for fit in expert.branches.values()]
    figures = (fits[0].figures if fits else None) or {}
    speedups = [
        f"{one.threshold:g}" + (f" ({one.speedup:.3g}x)" if one.speedup else "")
        for one in entry.thresholds
    ]
    copied = f"copied from {entry.copied_from}" if entry.status == "copied" else entry.status
    return {
        "entry": entry.label,
        "status": copied,
        "engine": entry.engine,
        "model": entry.title or entry.checkpoint.repository,
        "class": entry.transformer_class,
        "signal": entry.signal,
        "degree": max((fit.degree for fit in fits), default=None),
        "steps": entry.protocol.num_steps,
        "r2_held_out": figures.get("r2_held_out"),
        "thresholds": ", ".join(speedups[:4]) + (", ..." if len(speedups) > 4 else ""),
    }


def matching(
    every: Iterable[Entry],
    *,
    model: str | None = None,
    engine: str | None = None,
    status: str | None = None,
) -> list[Entry]:
    """Entries whose name, title, checkpoint or class contains ``model``, of one engine, of one status."""

    def fits(entry: Entry) -> bool:
        texts = (entry.model, entry.title, entry.checkpoint.repository, entry.transformer_class)
        return (
            (model is None or any(model.lower() in text.lower() for text in texts if text))
            and engine in (None, entry.engine)
            and status in (None, entry.status)
        )

    return [entry for entry in every if fits(entry)]


def as_json(every: Iterable[Entry]) -> str:
    """Whole entries, for programs."""
    return json.dumps([plain(entry) for entry in every], indent=2, ensure_ascii=False)


def as_csv(every: Iterable[Entry]) -> str:
    """The rows of the list as CSV."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(row, every))
    return stream.getvalue().rstrip("\n")


def as_table(every: Iterable[Entry]) -> str:
    """The rows of the list in columns for a terminal."""
    shown = [column for column in COLUMNS if column not in ("class", "signal")]
    return columns(shown, [[row(entry)[column] for column in shown] for entry in every])


def as_markdown(every: Iterable[Entry]) -> str:
    """The rows of the list as a Markdown table."""
    shown = [column for column in COLUMNS if column not in ("engine", "class")]
    lines = [f"| {' | '.join(shown)} |", f"|{' --- |' * len(shown)}"]
    lines += [f"| {' | '.join(_cell(row(entry)[column]) for column in shown)} |" for entry in every]
    return "\n".join(lines)


def columns(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Left-aligned columns; ``None`` is left blank."""
    cells = [list(head), *([_cell(value) for value in one] for one in rows)]
    widths = [max(len(one[place]) for one in cells) for place in range(len(head))]
    return "\n".join("  ".join(map(str.ljust, one, widths)).rstrip() for one in cells)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- one entry ------------------------------------------------------------------------------------------------------


def described(entry: Entry) -> str:
    """One entry for a reader: origin, protocol, polynomials with their figures, thresholds, warnings."""
    protocol = {
        key: value for key, value in plain(entry.protocol).items() if key != "call_arguments"
    }
    facts = {
        "status": row(entry)["status"],
        "model": row(entry)["model"],
        "checkpoint": "@".join(
            filter(None, (entry.checkpoint.repository, entry.checkpoint.revision))
        ),
        "class": entry.transformer_class,
        "signal": " - ".join(filter(None, (entry.signal, entry.signal_note))),
        "target": entry.target,
        "sign rule": entry.sign_rule,
        "protocol": _pairs(protocol),
        "window": _pairs({"start": entry.start, "end": entry.end, "max_skips": entry.max_skips}),
        "source": entry.source.reference or _pairs(plain(entry.source)),
        "notes": entry.notes,
    }
    lines = [entry.label, *(f"{name + ':':<12}{text}" for name, text in facts.items() if text)]
    for name, expert in entry.experts.items():
        for branch, fit in expert.branches.items():
            mark = (
                ", recommended" if branch == expert.recommended and len(expert.branches) > 1 else ""
            )
            lines += [
                "",
                f"{name}/{branch} (degree {fit.degree}, {fit.method}{mark})",
                *_fit_lines(fit),
            ]
        for branch, ratios in (expert.mag_ratios or {}).items():
            low, high = min(ratios), max(ratios)
            lines.append(
                f"{name}/{branch}: {len(ratios)} magnitude ratios, {low:.4g} to {high:.4g}"
            )
    if entry.thresholds:
        known = [
            key
            for key in _THRESHOLD_COLUMNS
            if any(getattr(one, key) is not None for one in entry.thresholds)
        ]
        lines += [
            "",
            columns(known, [[getattr(one, key) for key in known] for one in entry.thresholds]),
        ]
    lines += [
        f"plan: {plan.schedule} ({plan.computed_steps} computed)" for plan in entry.plans or ()
    ]
    return "\n".join([*lines, *(f"warning: {text}" for text in entry.warnings)])


_THRESHOLD_COLUMNS = (
    *("threshold", "kind", "computed_steps", "num_steps", "speedup", "psnr_db", "ssim"),
    *("ms_ssim", "latent_rel_l2", "worst_psnr_db", "hardware", "note"),
)


def _fit_lines(fit: Candidate) -> list[str]:
    lines = [f"  {_terms(fit.coefficients_high_to_low)}"]
    lines.append(
        "  domain "
        + (f"{fit.domain[0]:.4g} to {fit.domain[1]:.4g}" if fit.domain else "not published")
    )
    counts = plain(fit.counts) if fit.counts else {}
    for known in (counts, fit.figures or {}):
        if known:
            lines.append("  " + _pairs(known))
    return [*lines, f"  {fit.why}"] if fit.why else lines


def _terms(coefficients: Sequence[float]) -> str:
    degree = len(coefficients) - 1
    return " ".join(f"{value:+.6g}" + (f" x^{degree - place}" if place < degree else "")
                    for place, value in enumerate(coefficients))  # fmt: skip


def _pairs(values: dict) -> str:
    return ", ".join(f"{key} {_cell(value)}" for key, value in values.items() if value is not None)


# --- two entries ----------------------------------------------------------------------------------------------------


def difference(first: Entry, second: Entry) -> str:
    """Two entries side by side: settings, coefficients, domains, and the curves where both may be used."""
    lines = [columns(("", first.label, second.label), _differing_facts(first, second))]
    for name in [name for name in first.experts if name in second.experts]:
        branches = first.experts[name].branches, second.experts[name].branches
        common = [branch for branch in branches[0] if branch in branches[1]]
        for branch in common or ([None] if all(branches) else []):
            lines += ["", *_curves(name, branch, first, second)]
    only = set(first.experts) ^ set(second.experts)
    return "\n".join([*lines, *([f"\nonly one has {', '.join(sorted(only))}"] if only else [])])


def _differing_facts(first: Entry, second: Entry) -> list[tuple[str, Any, Any]]:
    def facts(entry: Entry) -> dict[str, Any]:
        protocol = {f"protocol.{key}": value for key, value in plain(entry.protocol).items()}
        names = ("transformer_class", "signal", "target", "sign_rule", "start", "end", "max_skips")
        return {
            "status": row(entry)["status"],
            "checkpoint": entry.checkpoint.repository,
            **{name: getattr(entry, name) for name in names},
            **protocol,
            "thresholds": row(entry)["thresholds"],
        }

    one, other = facts(first), facts(second)
    names = [*one, *(name for name in other if name not in one)]
    return [
        (name, one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)
    ]


def _curves(expert: str, branch: str | None, first: Entry, second: Entry) -> list[str]:
    fits = first.fit(expert, branch), second.fit(expert, branch)
    lists = [fit.coefficients_high_to_low for fit in fits]
    degree = max(map(len, lists)) - 1
    one, other = ([None] * (degree + 1 - len(values)) + list(values) for values in lists)
    rows = [(f"x^{degree - place}", one[place], other[place], _share(one[place], other[place]))
            for place in range(degree + 1)]  # fmt: skip
    domains = [
        f"{fit.domain[0]:.4g} to {fit.domain[1]:.4g}" if fit.domain else "unknown" for fit in fits
    ]
    title = f"{expert}/{branch or 'recommended'}"
    lines = [
        columns(
            (title, first.label, second.label, "difference"), [*rows, ("domain", *domains, None)]
        ),
        "",
    ]
    span = common_domain(*fits)
    if span is None:
        return [*lines, "the domains do not meet: there is no x at which both may be used"]
    low, high = span
    grid = [low + (high - low) * point / (POINTS - 1) for point in range(POINTS)]
    curves = fits[0].polynomial(first.sign_rule), fits[1].polynomial(second.sign_rule)
    rows = [_compared(x, *curves) for x in grid]
    apart = [one for one in rows if one[4]]
    span_said = f"x from {low:.4g} to {high:.4g}" + (
        "" if any(fit.domain for fit in fits) else ", no domain is known"
    )
    said = f"{span_said}: apart by more than {DISAGREEMENT:.0%} at {len(apart)} of {POINTS} points"
    return [*lines, columns(("x", first.label, second.label, "difference", ""), rows), said]


def common_domain(first: Candidate, second: Candidate) -> tuple[float, float] | None:
    """Where both fits may be used; 0 to 0.5 stands for a domain that nobody published. None if they do not meet."""
    domains = [fit.domain for fit in (first, second) if fit.domain] or [(0.0, 0.5)]
    low, high = max(domain[0] for domain in domains), min(domain[1] for domain in domains)
    return (low, high) if low < high else None


def _compared(
    x: float, first: Polynomial, second: Polynomial
) -> tuple[float, float, float, str | None, str | None]:
    one, other = first.predict(x), second.predict(x)
    size = max(abs(one), abs(other))
    apart = abs(one - other) > DISAGREEMENT * size if size else False
    return x, one, other, _share(one, other), "<-" if apart else None


def _share(one: float | None, other: float | None) -> str | None:
    if one is None or other is None or not max(abs(one), abs(other)):
        return None
    return f"{(other - one) / max(abs(one), abs(other)):+.0%}"
