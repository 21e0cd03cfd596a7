"""What every engine's form needs: the request, the polynomials and the threshold, and what is read back."""

import math
from dataclasses import dataclass

from coeffs.engines.releases import Release, misfits, plan_forms, releases
from coeffs.entry.polynomial import UNKNOWN_DOMAIN, falling_ranges, negative_ranges
from coeffs.entry.schema import Candidate, Entry
from coeffs.errors import EngineError

FORCED = "WARNING, written with --force"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to export: an entry with the choices that it leaves open."""

    entry: Entry
    threshold: float | None = None
    schedule: str | None = None
    release: str | None = None
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What a form says about an entry, read back from it; ``None`` where the form does not say."""

    coefficients: dict[str, tuple[float, ...]] | None = None
    threshold: float | None = None
    start: int | float | None = None
    end: int | float | None = None
    max_skips: int | None = None
    mag_ratios: dict[str, dict[str, tuple[float, ...]]] | None = None
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

    @property
    def only(self) -> list[float]:
        """The coefficients for an engine with one slot."""
        (fit,) = self.fits.values()
        return list(fit.coefficients_high_to_low)


def checked(request: Request, engine: str) -> tuple[Release, list[str]]:
    """The engine's release and the notes that open its form.

    Raises:
        EngineError: Another release was asked for than the table knows, or the engine would ignore,
            misread or crash on the entry and the request does not force it.
    """
    release = releases()[engine]
    if request.release not in (None, release.version):
        raise EngineError(
            f"release {str(request.release)[:40]!r} of {engine}: what it does is known for {release.version} only; "
            f"leave --release out, and try the form there"
        )
    problems = misfits(engine, request.entry)
    if problems and not request.force:
        raise EngineError(problems[0])
    notes = [described(request.entry), f"written for {release.release}"]
    return release, notes + [f"{FORCED}: {problem}" for problem in problems]


def described(entry: Entry) -> str:
    """One line for a comment: which entry, from where, fitted on which signal."""
    origin = f"copied from {entry.copied_from}" if entry.status == "copied" else entry.status
    return f"{entry.label} ({origin}), teacal registry; fitted on: {entry.signal}, target: {entry.target}"


def setting(request: Request, engine: str, sign_rule: str | None = None) -> Setting:
    """The polynomials and the threshold for an engine, or a refusal that says what would have to change.

    Args:
        sign_rule: What the engine makes of a negative prediction, where the release has no one rule.
    """
    entry = request.entry
    release, notes = checked(request, engine)
    if not any(expert.branches for expert in entry.experts.values()):
        raise EngineError(
            f"{entry.label} has no coefficients: export its ratios or plans to {' or '.join(plan_forms())}"
        )
    rule = sign_rule or release.sign_rule or entry.sign_rule
    if len(entry.experts) > release.experts:
        raise EngineError(
            f"{entry.label} has polynomials for {' and '.join(entry.experts)}, {engine} has one slot: use "
            "tensorrt-llm, which has two"
        )
    fits = {}
    for name in entry.experts:
        fit, said = _fit(entry, name, release, engine)
        _check_sign(entry, fit, rule, engine)
        fits[name] = fit
        notes += [*said, *_shape_notes(fit)]
    threshold, said = chosen_threshold(entry, request.threshold)
    return Setting(fits=fits, threshold=threshold, notes=(*notes, *said))


def chosen_threshold(entry: Entry, wanted: float | None) -> tuple[float, list[str]]:
    """The threshold that travels with the coefficients, and a remark when it is not one of the entry's."""
    known = list(dict.fromkeys(row.threshold for row in entry.thresholds))
    if wanted is None:
        if len(known) == 1:
            return known[0], []
        numbers = ", ".join(f"{value:g}" for value in known)
        said = f"has thresholds {numbers}" if known else "has no threshold"
        raise EngineError(
            f"{entry.label} {said}: choose with --threshold; coefficients mean nothing without one"
        )
    if not (math.isfinite(wanted) and wanted > 0):
        raise EngineError(f"threshold {wanted}: expected a number above 0")
    for value in known:
        if f"{value:.4g}" == f"{wanted:.4g}":  # `calibrate show` prints four digits
            return value, []
    unknown = [f"threshold {wanted:g} is not one that the entry reports on"]
    return wanted, unknown


def _fit(entry: Entry, expert: str, release: Release, engine: str) -> tuple[Candidate, list[str]]:
    fit = entry.fit(expert)
    branches = entry.experts[expert].branches
    highest = (release.exactly or release.at_most) - 1
    said = []
    if len(branches) > 1:
        used = entry.experts[expert].recommended
        names = ", ".join(branches)
        said.append(f"{expert}: one slot for {names}; this is {used}, the recommended one")
    if _degree(fit) <= highest:
        return fit, said
    lower = [other for other in fit.alternatives if _degree(other) <= highest]
    if not lower:
        raise EngineError(
            f"{entry.label}: degree {fit.degree}, {engine} takes at most {highest}: fit the run again with "
            f"`calibrate fit RUN --degree {highest}`"
        )
    best = max(lower, key=_degree)
    replaced = (
        f"the entry's alternative of degree {best.degree}, since degree {fit.degree} is too much"
    )
    return best, [*said, f"{expert}: {replaced}"]


def _degree(fit: Candidate) -> int:
    return len(fit.coefficients_high_to_low) - 1


def _check_sign(entry: Entry, fit: Candidate, rule: str, engine: str) -> None:
    if rule == entry.sign_rule:
        return
    negative = negative_ranges(fit.polynomial(), fit.domain or UNKNOWN_DOMAIN)
    if not negative:
        return
    where = "on its domain" if fit.domain else "in 0 to 0.5 (its domain was never published)"
    first = ", ".join(f"{low:.3g} to {high:.3g}" for low, high in negative[:2])
    again = "measure the model with `calibrate --model`"
    if entry.status == "measured":
        again = "fit it again with `calibrate fit RUN --constrained`"
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
    if falling := falling_ranges(fit.polynomial(), fit.domain):
        notes.append(f"falls with x from {falling[0][0]:.3g} to {falling[0][1]:.3g}")
    return notes


def window(entry: Entry, engine: str, modes: list[str] | None = None) -> tuple[str, list[str]]:
    """The engine's mode whose always-computed first and last steps suit the entry, and a remark where they differ.

    A mode that computes at least the entry's steps is taken, or else one that lacks a single step at either end.

    Args:
        modes: The modes that may be taken, where the signal leaves no choice; all of the release's otherwise.
    """
    known = releases()[engine].windows
    known = {name: known[name] for name in modes or known}
    wanted = (steps(entry, entry.start, 1), steps(entry, entry.end, 0))
    for slack in (0, 1):
        for name, (first, last) in known.items():
            if wanted[0] <= first + slack and wanted[1] <= last + slack:
                entrys = f"(entry: {wanted[0]} and {wanted[1]})"
                said = f"always computed: first {first} and last {last} steps {entrys}"
                return name, [] if (first, last) == wanted else [said]
    choices = " or ".join(f"{first} and {last}" for first, last in known.values())
    raise EngineError(
        f"{entry.label} computes the first {wanted[0]} and the last {wanted[1]} steps, "
        f"{engine} only {choices}: change start and end of a copy of the entry"
    )


def steps(entry: Entry, value: int | float | None, default: int) -> int:
    """A window's edge as a whole number of steps."""
    if value is None:
        return default
    if isinstance(value, int) or value == 0:
        return int(value)
    if entry.protocol.num_steps is None:
        raise EngineError(
            f"{entry.label}: the window is a fraction ({value:g}) and the number of steps is not known"
        )
    return math.ceil(value * entry.protocol.num_steps - 1e-9)


def padded(coefficients: list[float], count: int) -> list[float]:
    """Leading zeros up to ``count`` coefficients: the same polynomial."""
    return [0.0] * (count - len(coefficients)) + coefficients


def stripped(coefficients: tuple[float, ...]) -> tuple[float, ...]:
    """Without leading zeros, so that padded and unpadded lists compare equal."""
    first = 0
    while first < len(coefficients) - 1 and coefficients[first] == 0:
        first += 1
    return tuple(coefficients[first:])
