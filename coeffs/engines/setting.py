"""What every engine's form needs: the setting to carry over, and the refusals when it cannot be carried."""

import math
from dataclasses import dataclass

from coeffs.entry.polynomial import UNKNOWN_DOMAIN, falling_ranges, negative_ranges
from coeffs.entry.schema import Candidate, Entry
from coeffs.entry.strict_yaml import format_float
from coeffs.errors import EngineError


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to export: an entry with the choices that it leaves open."""

    entry: Entry
    threshold: float | None = None
    schedule: str | None = None


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What a form says about an entry, read back from it; ``None`` where the form does not say."""

    coefficients: dict[str, tuple[float, ...]] | None = None
    threshold: float | None = None
    start: int | float | None = None
    end: int | float | None = None
    max_skips: int | None = None
    mag_ratios: dict[str, tuple[float, ...]] | None = None
    schedule: str | None = None
    sign_rule: str | None = None
    signal: str | None = None
    entry: Entry | None = None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Polynomials per expert, threshold and notes, in the way that the engine will read them."""

    fits: dict[str, Candidate]
    threshold: float
    notes: tuple[str, ...]


def setting(
    request: Request, engine: str, *, sign_rule: str, experts: int = 1, max_degree: int = 6
) -> Setting:
    """The polynomials and the threshold for an engine, or a refusal that says what would have to change."""
    entry = request.entry
    if len(entry.experts) > experts:
        raise EngineError(
            f"{entry.label} has polynomials for {' and '.join(entry.experts)}, {engine} has one slot: use an engine "
            "with one per expert (sglang, tensorrt-llm)"
        )
    fits, notes = {}, [described(entry)]
    for name in entry.experts:
        fit, said = _fitting(entry, name, max_degree, engine)
        _check_sign(entry, fit, sign_rule, engine)
        fits[name] = fit
        notes += [*said, *_shape_notes(fit)]
    threshold, said = chosen_threshold(entry, request.threshold)
    return Setting(fits=fits, threshold=threshold, notes=(*notes, *said))


def described(entry: Entry) -> str:
    """One line for a comment: which entry, from where, fitted on which signal."""
    origin = f"copied from {entry.copied_from}" if entry.status == "copied" else entry.status
    return f"{entry.label} ({origin}), teacal registry; fitted on: {entry.signal}, target: {entry.target}"


def chosen_threshold(entry: Entry, wanted: float | None) -> tuple[float, list[str]]:
    """The threshold that travels with the coefficients, and a remark when it is not one of the entry's."""
    known = list(dict.fromkeys(row.threshold for row in entry.thresholds))
    if wanted is None:
        if len(known) != 1:
            said = f"has thresholds {_numbers(known)}" if known else "has no threshold"
            raise EngineError(
                f"{entry.label} {said}: choose with --threshold; coefficients mean nothing without one"
            )
        return known[0], []
    if not (math.isfinite(wanted) and wanted > 0):
        raise EngineError(f"threshold {wanted}: expected a number above 0")
    return wanted, [] if wanted in known else [
        f"threshold {wanted:g} is not one that the entry reports on"
    ]


def _fitting(
    entry: Entry, expert: str, max_degree: int, engine: str
) -> tuple[Candidate, list[str]]:
    fit = entry.fit(expert)
    branches = entry.experts[expert].branches
    said = []
    if len(branches) > 1:
        used = entry.experts[expert].recommended
        said.append(
            f"{expert}: one slot for {', '.join(branches)}; this is {used}, the recommended one"
        )
    if fit.degree <= max_degree:
        return fit, said
    lower = [other for other in fit.alternatives if other.degree <= max_degree]
    if not lower:
        raise EngineError(
            f"{entry.label}: degree {fit.degree}, {engine} takes at most {max_degree}: fit the run again with "
            f"`calibrate fit RUN --degree {max_degree}`"
        )
    best = max(lower, key=lambda other: other.degree)
    return best, [
        *said,
        f"{expert}: the entry's alternative of degree {best.degree}, since degree {fit.degree} is too much",
    ]


def _check_sign(entry: Entry, fit: Candidate, rule: str, engine: str) -> None:
    if rule == entry.sign_rule:
        return
    negative = negative_ranges(fit.polynomial(), fit.domain or UNKNOWN_DOMAIN)
    if negative:
        where = "on its domain" if fit.domain else "in 0 to 0.5 (its domain was never published)"
        first = ", ".join(f"{low:.3g} to {high:.3g}" for low, high in negative[:2])
        again = "fit it again with `calibrate fit RUN --constrained`"
        again = (
            again if entry.status == "measured" else "measure the model with `calibrate --model`"
        )
        raise EngineError(
            f"{entry.label} is negative {where} (x {first}): {engine} reads that as {rule}, the entry as "
            f"{entry.sign_rule}; {again}"
        )


def _shape_notes(fit: Candidate) -> list[str]:
    if fit.domain is None:
        return ["the fitted domain was never published: predictions are not bounded"]
    low, high = fit.domain
    notes = [
        f"fitted on x from {low:g} to {high:g}; the engine knows no domain and extrapolates outside"
    ]
    falling = falling_ranges(fit.polynomial(), fit.domain)
    if falling:
        notes.append(f"falls with x from {falling[0][0]:.3g} to {falling[0][1]:.3g}")
    return notes


def window(entry: Entry, modes: dict[str, tuple[int, int]], engine: str) -> tuple[str, list[str]]:
    """The engine's mode whose always-computed first and last steps suit the entry, and a remark where they differ.

    A mode that computes at least the entry's steps is taken, or else one that lacks a single step at either end.

    Args:
        modes: Name -> (first steps, last steps), preferred first.
    """
    wanted = (steps(entry, entry.start, 1), steps(entry, entry.end, 0))
    for slack in (0, 1):
        for name, (first, last) in modes.items():
            if wanted[0] <= first + slack and wanted[1] <= last + slack:
                said = f"always computed: first {first} and last {last} steps (entry: {wanted[0]} and {wanted[1]})"
                return name, [] if (first, last) == wanted else [said]
    known = " or ".join(f"{first} and {last}" for first, last in modes.values())
    raise EngineError(
        f"{entry.label} computes the first {wanted[0]} and the last {wanted[1]} steps, {engine} only {known}: change "
        "start and end of a copy of the entry"
    )


def steps(entry: Entry, value: int | float | None, default: int) -> int:
    """A window's edge as a whole number of steps."""
    if value is None:
        return default
    if isinstance(value, int):
        return value
    if value == 0:
        return 0
    if entry.protocol.num_steps is None:
        raise EngineError(
            f"{entry.label}: the window is a fraction ({value:g}) and the number of steps is not known"
        )
    return math.ceil(value * entry.protocol.num_steps - 1e-9)


def padded(coefficients: tuple[float, ...], count: int) -> list[float]:
    """Leading zeros up to ``count`` coefficients: the same polynomial."""
    return [0.0] * (count - len(coefficients)) + list(coefficients)


def stripped(coefficients: tuple[float, ...]) -> tuple[float, ...]:
    """Without leading zeros, so that padded and unpadded lists compare equal."""
    first = next(
        (place for place, value in enumerate(coefficients) if value != 0), len(coefficients) - 1
    )
    return tuple(coefficients[first:])


def number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise EngineError(f"{what}: {str(value)[:60]!r}, expected a finite number")
    return float(value)


def number_list(value: object, what: str) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= 10_000:
        raise EngineError(
            f"{what}: {str(value)[:60]!r}, expected a list of numbers, highest power first"
        )
    return tuple(number(item, what) for item in value)


def flow(values: list[float] | tuple[float, ...]) -> str:
    """A list of floats that Python, JSON and YAML 1.1 all read alike."""
    return "[" + ", ".join(format_float(float(value)) for value in values) + "]"


def comment(notes: tuple[str, ...] | list[str], mark: str = "# ") -> str:
    return "".join(f"{mark}{note}\n" for note in notes)


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
