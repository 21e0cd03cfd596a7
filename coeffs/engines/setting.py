"""What every engine's form needs: the request, the polynomials and the threshold, and what is read back."""

import math
from dataclasses import dataclass, field

from coeffs.engines.releases import Release, misfits, plan_forms, releases
from coeffs.entry.certificates import EXACT
from coeffs.entry.fields import Edge, Number, Numbers, Text
from coeffs.entry.polynomial import (
    MAX_DEGREE,
    UNKNOWN_DOMAIN,
    falling_ranges,
    negative_ranges,
)
from coeffs.entry.schema import Candidate, Entry
from coeffs.errors import EngineError

FORCED = "WARNING, written with --force"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to export, and to whom: an entry with the choices that it leaves open.

    ``notes`` gather what the form's reader has to know, in the order in which it is found out.
    """

    entry: Entry
    engine: str
    threshold: Number = None
    schedule: Text = None
    release: Text = None
    force: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def facts(self) -> Release:
        return releases()[self.engine]


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What a form says about an entry, read back from it; empty or ``None`` where the form does not say."""

    coefficients: dict[str, Numbers] = field(default_factory=dict)
    threshold: Number = None
    start: Edge = None
    end: Edge = None
    max_skips: int | None = None
    mag_ratios: dict[str, dict[str, Numbers]] = field(default_factory=dict)
    schedule: Text = None
    sign_rule: Text = None
    signal: Text = None
    entry: Entry | None = None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Coefficients per expert, as many as the engine takes, and the threshold that belongs to them."""

    coefficients: dict[str, list[float]]
    threshold: float

    @property
    def only(self) -> list[float]:
        """The coefficients for an engine with one slot."""
        (coefficients,) = self.coefficients.values()
        return coefficients


def opening(request: Request) -> None:
    """The notes that open every form.

    Raises:
        EngineError: Another release was asked for than the table knows, or the engine would ignore,
            misread or crash on the entry and the request does not force it.
    """
    entry, engine, facts = request.entry, request.engine, request.facts
    if request.release not in (None, facts.version):
        raise EngineError(
            f"release {str(request.release)[:40]!r} of {engine}: what it does is known for {facts.version} only; "
            "leave --release out, and try the form there"
        )
    problems = misfits(engine, entry)
    if problems and not request.force:
        raise EngineError(problems[0])
    request.notes.extend(
        [
            f"{entry.label} ({entry.origin}), teacal registry; fitted on: {entry.signal}, target: {entry.target}",
            f"written for {facts.release}",
            *(f"{FORCED}: {problem}" for problem in problems),
        ]
    )


def setting(request: Request, sign_rule: Text = None) -> Setting:
    """The coefficients and the threshold for an engine, or a refusal that says what would have to change.

    Args:
        sign_rule: What the engine makes of a negative prediction, where the release has no one rule.
    """
    entry, engine, facts, notes = request.entry, request.engine, request.facts, request.notes
    opening(request)
    if not entry.has_polynomials:
        raise EngineError(
            f"{entry.label} has no coefficients: export its ratios or plans to {' or '.join(plan_forms())}"
        )
    if len(entry.experts) > facts.experts:
        raise EngineError(
            f"{entry.label} has polynomials for {' and '.join(entry.experts)}, {engine} has one slot: use "
            "tensorrt-llm, which has two"
        )
    coefficients = {}
    for name, expert in entry.experts.items():
        if len(expert.branches) > 1:
            notes.append(
                f"{name}: one slot for {', '.join(expert.branches)}; this is {expert.recommended}, the recommended one"
            )
        fit = _fit(request, name)
        _check_sign(request, fit, sign_rule or facts.sign_rule or entry.sign_rule)
        # Leading zeros leave the polynomial the same.
        padding = [0.0] * ((facts.exactly or 0) - fit.degree - 1)
        coefficients[name] = [*padding, *fit.coefficients_high_to_low]
        if fit.domain is None:
            notes.append("the fitted domain was never published: predictions are not bounded")
            continue
        low, high = fit.domain
        notes.append(
            f"fitted on x from {low:g} to {high:g}; the engine knows no domain and extrapolates outside"
        )
        for left, right in falling_ranges(fit.polynomial(), fit.domain)[:1]:
            notes.append(f"falls with x from {left:.3g} to {right:.3g}")
    threshold = _threshold(request)
    certified(request, threshold)
    return Setting(coefficients=coefficients, threshold=threshold)


def certified(request: Request, setting: float | str) -> None:
    """Notes what the entry promises of a threshold or schedule, and how the engine's requests name that quality."""
    notes, names = request.notes, request.facts.quality
    for proof in request.entry.certificates:
        if setting == (proof.plan.schedule if proof.plan else proof.threshold):
            notes.append(
                f"certified, with our runtime: {proof.promise}; dtype {proof.protocol.dtype}"
            )
            if proof.tier in names:
                notes.append(
                    f"in a request quality={names[proof.tier]!r} asks for this tier, quality={names[EXACT]!r} for no "
                    "cache"
                )


def _threshold(request: Request) -> float:
    """The threshold that travels with the coefficients; one that is not the entry's is noted."""
    label, wanted = request.entry.label, request.threshold
    known = list(dict.fromkeys(row.threshold for row in request.entry.thresholds))
    if wanted is None:
        if len(known) == 1:
            return known[0]
        numbers = ", ".join(f"{value:g}" for value in known)
        said = f"has thresholds {numbers}" if known else "has no threshold"
        raise EngineError(
            f"{label} {said}: choose with --threshold; coefficients mean nothing without one"
        )
    if not 0 < wanted < math.inf:
        raise EngineError(f"threshold {wanted}: expected a number above 0")
    for value in known:
        if f"{value:.4g}" == f"{wanted:.4g}":  # `calibrate show` prints four digits
            return value
    request.notes.append(f"threshold {wanted:g} is not one that the entry reports on")
    return wanted


def _fit(request: Request, expert: str) -> Candidate:
    """The recommended fit, or the entry's best alternative of a degree that the engine takes."""
    entry, engine, facts = request.entry, request.engine, request.facts
    fit = entry.fit(expert)
    highest = facts.exactly - 1 if facts.exactly else MAX_DEGREE
    if fit.degree <= highest:
        return fit
    lower = [other for other in fit.alternatives if other.degree <= highest]
    if not lower:
        raise EngineError(
            f"{entry.label}: degree {fit.degree}, {engine} takes at most {highest}: fit the run again with "
            f"`calibrate fit RUN --degree {highest}`"
        )
    best = max(lower, key=lambda other: other.degree)
    request.notes.append(
        f"{expert}: the entry's alternative of degree {best.degree}, since degree {fit.degree} is too much"
    )
    return best


def _check_sign(request: Request, fit: Candidate, rule: str) -> None:
    entry = request.entry
    negative = negative_ranges(fit.polynomial(), fit.domain or UNKNOWN_DOMAIN)
    if rule == entry.sign_rule or not negative:
        return
    where = "on its domain" if fit.domain else "in 0 to 0.5 (its domain was never published)"
    first = ", ".join(f"{low:.3g} to {high:.3g}" for low, high in negative[:2])
    again = "measure the model with `calibrate --model`"
    if entry.status == "measured":
        again = "fit it again with `calibrate fit RUN --constrained`"
    raise EngineError(
        f"{entry.label} is negative {where} (x {first}): {request.engine} reads that as {rule}, the entry as "
        f"{entry.sign_rule}; {again}"
    )


def window(request: Request, modes: list[str] | None = None) -> str:
    """The engine's mode whose always-computed first and last steps suit the entry; notes where they differ.

    A mode that computes at least the entry's steps is taken, or else one that lacks a single step at either end.

    Args:
        modes: The modes that may be taken, where the signal leaves no choice; all of the release's otherwise.
    """
    entry, known = request.entry, request.facts.windows
    known = {name: known[name] for name in modes or known}
    start, end = edges(entry)
    for slack in (0, 1):
        for name, (first, last) in known.items():
            if start <= first + slack and end <= last + slack:
                if (first, last) != (start, end):
                    request.notes.append(
                        f"always computed: first {first} and last {last} steps (entry: {start} and {end})"
                    )
                return name
    choices = " or ".join(f"{first} and {last}" for first, last in known.values())
    raise EngineError(
        f"{entry.label} computes the first {start} and the last {end} steps, "
        f"{request.engine} only {choices}: change start and end of a copy of the entry"
    )


def edges(entry: Entry) -> tuple[int, int]:
    """How many steps at the start and at the end of the schedule always compute."""
    count = entry.protocol.num_steps
    whole = []
    for value in (1 if entry.start is None else entry.start, entry.end or 0):
        if isinstance(value, float) and value:
            if count is None:
                raise EngineError(
                    f"{entry.label}: the window is a fraction ({value:g}) and the number of steps is not known"
                )
            value = math.ceil(value * count - 1e-9)
        whole.append(int(value))
    return whole[0], whole[1]


def stripped(coefficients: Numbers) -> Numbers:
    """Without leading zeros, so that padded and unpadded lists compare equal."""
    while len(coefficients) > 1 and coefficients[0] == 0:
        coefficients = coefficients[1:]
    return coefficients
