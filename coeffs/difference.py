"""Two entries side by side: for `calibrate diff`."""

from collections.abc import Iterator
from typing import Any

from coeffs.describe import WIDTH, columns, row, span_of, status_of
from coeffs.entry.fields import plain
from coeffs.entry.polynomial import UNKNOWN_DOMAIN, Polynomial
from coeffs.entry.schema import Candidate, Entry

# Curves that differ by more than a quarter skip visibly different steps at the same threshold.
DISAGREEMENT = 0.25
POINTS = 11


def difference(first: Entry, second: Entry, width: int = WIDTH) -> str:
    """Two entries side by side: settings, coefficients, domains, and curves on the common domain."""
    facts, other = _compared_facts(first), _compared_facts(second)
    rows = []
    for name in {**facts, **other}:
        if facts.get(name) != other.get(name):
            rows.append((name, facts.get(name), other.get(name)))
    parts = [columns(("", first.label, second.label), rows, width)]
    for name, expert in first.experts.items():
        if name not in second.experts:
            continue
        theirs = second.experts[name].branches
        common: list[str | None] = [branch for branch in expert.branches if branch in theirs]
        if not common and expert.branches and theirs:
            common = [None]  # the recommended branches, whatever their names
        for branch in common:
            parts += ["", *_curves(name, branch, first, second, width)]
    only = sorted(set(first.experts) ^ set(second.experts))
    if only:
        parts.append(f"\nonly one has {', '.join(only)}")
    return "\n".join(parts)


def _compared_facts(entry: Entry) -> dict[str, Any]:
    facts = {"status": status_of(entry), "checkpoint": entry.checkpoint.repository}
    for name in ("transformer_class", "signal", "target", "sign_rule", "start", "end", "max_skips"):
        facts[name] = getattr(entry, name)
    for name, value in plain(entry.protocol).items():
        facts[f"protocol.{name}"] = value
    return facts | {"thresholds": row(entry)["thresholds"]}


def _curves(
    expert: str, branch: str | None, first: Entry, second: Entry, width: int
) -> Iterator[str]:
    fits = first.fit(expert, branch), second.fit(expert, branch)
    labels = (first.label, second.label, "difference")
    rows: list[tuple[Any, ...]] = []
    for power in range(max(fit.degree for fit in fits), -1, -1):
        values = [_coefficient(fit, power) for fit in fits]
        rows.append((f"x^{power}", *values, _share(*values)))
    rows.append(("domain", *map(span_of, fits), None))
    yield columns((f"{expert}/{branch or 'recommended'}", *labels), rows, width)
    yield ""
    # 0 to 0.5 stands for a domain that nobody published.
    domains = [fit.domain for fit in fits if fit.domain] or [UNKNOWN_DOMAIN]
    low, high = max(domain[0] for domain in domains), min(domain[1] for domain in domains)
    if low >= high:
        yield "the domains do not meet: there is no x at which both may be used"
        return
    curves = fits[0].polynomial(first.sign_rule), fits[1].polynomial(second.sign_rule)
    points = [low + (high - low) * point / (POINTS - 1) for point in range(POINTS)]
    rows = [_point(x, *curves) for x in points]
    yield columns(("x", *labels, ""), rows, width)
    unknown = "" if any(fit.domain for fit in fits) else ", no domain is known"
    apart = sum(values[-1] is not None for values in rows)
    said = f"apart by more than {DISAGREEMENT:.0%} at {apart} of {POINTS} points"
    yield f"x from {low:.4g} to {high:.4g}{unknown}: {said}"


def _coefficient(fit: Candidate, power: int) -> float | None:
    return fit.coefficients_high_to_low[fit.degree - power] if power <= fit.degree else None


def _point(x: float, first: Polynomial, second: Polynomial) -> tuple[Any, ...]:
    values = first.predict(x), second.predict(x)
    size = max(map(abs, values))
    apart = abs(values[0] - values[1]) > DISAGREEMENT * size
    return x, *values, _share(*values), "<-" if apart else None


def _share(first: float | None, second: float | None) -> str | None:
    if first is None or second is None or not (first or second):
        return None
    return f"{(second - first) / max(abs(first), abs(second)):+.0%}"
