"""Two entries side by side: for `calibrate diff`."""

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from coeffs.describe import WIDTH, columns, row, span_of
from coeffs.entry.fields import Number, Text, plain
from coeffs.entry.polynomial import UNKNOWN_DOMAIN
from coeffs.entry.schema import Entry
from coeffs.entry.strict_yaml import Plain

# Curves that differ by more than a quarter skip visibly different steps at the same threshold.
DISAGREEMENT = 0.25
POINTS = 11
_COMPARED = "transformer_class", "signal", "target", "sign_rule", "start", "end", "max_skips"


def difference(first: Entry, second: Entry, width: int = WIDTH) -> str:
    """Two entries side by side: settings, coefficients, domains, and curves on the common domain."""
    entries = (first, second)
    facts, other = map(_compared_facts, entries)
    rows = [
        (name, facts.get(name), other.get(name))
        for name in facts | other
        if facts.get(name) != other.get(name)
    ]
    parts = [columns(("", first.label, second.label), rows, width)]
    for name, expert in first.experts.items():
        theirs = second.experts[name].branches if name in second.experts else {}
        if expert.branches and theirs:
            common: list[Text] = [branch for branch in expert.branches if branch in theirs]
            # Without a branch of the same name: the recommended ones.
            for branch in common or [None]:
                parts += _branch_lines(name, branch, entries, width)
    only = sorted(set(first.experts) ^ set(second.experts))
    if only:
        parts.append(f"\nonly one has {', '.join(only)}")
    return "\n".join(parts)


def _compared_facts(entry: Entry) -> Plain:
    return {
        "status": entry.origin,
        "checkpoint": entry.checkpoint.repository,
        **{name: getattr(entry, name) for name in _COMPARED},
        **{f"protocol.{name}": value for name, value in plain(entry.protocol).items()},
        "thresholds": row(entry)["thresholds"],
    }


def _branch_lines(
    expert: str, branch: Text, entries: tuple[Entry, Entry], width: int
) -> Iterator[str]:
    """Coefficients, domains and curves of a branch."""
    fits = [entry.fit(expert, branch) for entry in entries]
    labels = (*(entry.label for entry in entries), "difference")
    low_to_high = zip_longest(*(fit.coefficients_high_to_low[::-1] for fit in fits))
    rows = [_compared(f"x^{power}", *pair) for power, pair in enumerate(low_to_high)]
    spans = ("domain", *map(span_of, fits), None)
    head = f"{expert}/{branch or 'recommended'}"
    yield "\n" + columns((head, *labels), [*reversed(rows), spans], width) + "\n"
    # 0 to 0.5 stands for a domain that nobody published.
    domains = [fit.domain for fit in fits if fit.domain]
    lows, highs = zip(*(domains or [UNKNOWN_DOMAIN]), strict=True)
    low, high = max(lows), min(highs)
    if low >= high:
        yield "the domains do not meet: there is no x at which both may be used"
        return
    curves = [entry.fit(expert, branch).polynomial(entry.sign_rule) for entry in entries]
    rows = []
    for point in range(POINTS):
        x = low + (high - low) * point / (POINTS - 1)
        ours, theirs = (curve.predict(x) for curve in curves)
        apart = abs(ours - theirs) > DISAGREEMENT * max(abs(ours), abs(theirs))
        rows.append((*_compared(x, ours, theirs), "<-" if apart else None))
    yield columns(("x", *labels, ""), rows, width)
    count = sum(values[-1] is not None for values in rows)
    unknown = "" if domains else ", no domain is known"
    yield (
        f"x from {low:.4g} to {high:.4g}{unknown}: "
        f"apart by more than {DISAGREEMENT:.0%} at {count} of {POINTS} points"
    )


def _compared(label: str | float, ours: Number, theirs: Number) -> tuple[Any, ...]:
    """A row: both values, and their difference as a share of the larger one."""
    share = None
    if ours is not None and theirs is not None and (ours or theirs):
        share = f"{(theirs - ours) / max(abs(ours), abs(theirs)):+.0%}"
    return label, ours, theirs, share
