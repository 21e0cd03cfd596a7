"""Two entries side by side: for `calibrate diff`."""

from collections.abc import Iterator
from typing import Any

from coeffs.describe import WIDTH, columns, row, span_of
from coeffs.entry.fields import plain
from coeffs.entry.polynomial import UNKNOWN_DOMAIN
from coeffs.entry.schema import Entry

# Curves that differ by more than a quarter skip visibly different steps at the same threshold.
DISAGREEMENT = 0.25
POINTS = 11


def difference(first: Entry, second: Entry, width: int = WIDTH) -> str:
    """Two entries side by side: settings, coefficients, domains, and curves on the common domain."""
    facts, other = _compared_facts(first), _compared_facts(second)
    rows = [
        (name, facts.get(name), other.get(name))
        for name in facts | other
        if facts.get(name) != other.get(name)
    ]
    parts = [columns(("", first.label, second.label), rows, width)]
    for name in (name for name in first.experts if name in second.experts):
        ours, theirs = first.experts[name].branches, second.experts[name].branches
        common: list[str | None] = [branch for branch in ours if branch in theirs]
        if ours and theirs:
            # Without a common name: the recommended branches.
            for branch in common or [None]:
                parts += ["", *_curves(name, branch, (first, second), width)]
    only = sorted(set(first.experts) ^ set(second.experts))
    if only:
        parts.append(f"\nonly one has {', '.join(only)}")
    return "\n".join(parts)


def _compared_facts(entry: Entry) -> dict[str, Any]:
    facts = {"status": entry.origin, "checkpoint": entry.checkpoint.repository}
    for name in ("transformer_class", "signal", "target", "sign_rule", "start", "end", "max_skips"):
        facts[name] = getattr(entry, name)
    for name, value in plain(entry.protocol).items():
        facts[f"protocol.{name}"] = value
    return facts | {"thresholds": row(entry)["thresholds"]}


def _curves(
    expert: str, branch: str | None, entries: tuple[Entry, Entry], width: int
) -> Iterator[str]:
    fits = [entry.fit(expert, branch) for entry in entries]
    labels = (*(entry.label for entry in entries), "difference")
    highest = max(fit.degree for fit in fits)
    rows: list[tuple[Any, ...]] = []
    padded = [(None,) * (highest - fit.degree) + fit.coefficients_high_to_low for fit in fits]
    for place, values in enumerate(zip(*padded, strict=True)):
        rows.append((f"x^{highest - place}", *values, _share(*values)))
    rows.append(("domain", *map(span_of, fits), None))
    yield columns((f"{expert}/{branch or 'recommended'}", *labels), rows, width)
    yield ""
    # 0 to 0.5 stands for a domain that nobody published.
    domains = [fit.domain for fit in fits if fit.domain]
    lows, highs = zip(*(domains or [UNKNOWN_DOMAIN]), strict=True)
    low, high = max(lows), min(highs)
    if low >= high:
        yield "the domains do not meet: there is no x at which both may be used"
        return
    curves = [fit.polynomial(entry.sign_rule) for fit, entry in zip(fits, entries, strict=True)]
    rows, apart = [], 0
    for point in range(POINTS):
        x = low + (high - low) * point / (POINTS - 1)
        ours, theirs = (curve.predict(x) for curve in curves)
        differs = abs(ours - theirs) > DISAGREEMENT * max(abs(ours), abs(theirs))
        rows.append((x, ours, theirs, _share(ours, theirs), "<-" if differs else None))
        apart += differs
    yield columns(("x", *labels, ""), rows, width)
    unknown = "" if domains else ", no domain is known"
    yield (
        f"x from {low:.4g} to {high:.4g}{unknown}: "
        f"apart by more than {DISAGREEMENT:.0%} at {apart} of {POINTS} points"
    )


def _share(first: float | None, second: float | None) -> str | None:
    if first is None or second is None or not (first or second):
        return None
    return f"{(second - first) / max(abs(first), abs(second)):+.0%}"
