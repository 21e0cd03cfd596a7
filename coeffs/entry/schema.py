"""The entry: coefficients, their source and what they are worth, as frozen dataclasses.

The annotations below are the definition of the format.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from coeffs.entry import fields
from coeffs.entry.certificates import Certificate
from coeffs.entry.fields import (
    MAX_STEPS,
    Limits,
    Name,
    Positive,
    Record,
    Slug,
    Steps,
    finite_number,
)
from coeffs.entry.plan import Plan as Plan  # for those that import it from here
from coeffs.entry.polynomial import (
    CONTROL_X,
    MAX_DEGREE,
    Polynomial,
    check_control_value,
    check_order,
)
from coeffs.entry.provenance import Checkpoint, Counts, Protocol, Source
from coeffs.entry.signals import SignalName
from coeffs.errors import EntryError, InvalidPolynomial

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Candidate(Record):
    """One fitted polynomial with its domain and figures.

    ``value_at_0p1`` is the bare polynomial's value at x = 0.1. It is filled in when missing and
    compared when stored, so that a list pasted in the other order cannot be loaded.
    """

    coefficients_high_to_low: tuple[float, ...]
    degree: Annotated[int, Limits(0, MAX_DEGREE)] = None  # type: ignore[assignment]  # filled in
    method: Literal["polyfit", "constrained", "published"] = "polyfit"
    value_at_0p1: float | None = None
    domain: tuple[float, float] | None = None
    counts: Counts | None = None
    figures: dict[Name, float | None] | None = None
    intervals: dict[Name, tuple[tuple[float, float], ...]] | None = None
    why: str | None = None

    def polynomial(self, sign_rule: str = "clamp") -> Polynomial:
        """The polynomial under ``sign_rule`` (an entry's ``sign_rule``)."""
        return Polynomial(self.coefficients_high_to_low, self.domain, sign_rule)

    def _check(self) -> None:
        try:
            value = self.polynomial().raw(CONTROL_X)
        except InvalidPolynomial as error:
            raise EntryError(str(error)) from None
        degree = len(self.coefficients_high_to_low) - 1
        if self.degree not in (None, degree):
            problem = f"{self.degree}, but {degree + 1} coefficients have degree {degree}"
            raise EntryError(f"{problem}: correct one of them", ("degree",))
        object.__setattr__(self, "degree", degree)
        if self.value_at_0p1 is None:
            check_order(self.coefficients_high_to_low, self.domain)
            object.__setattr__(self, "value_at_0p1", finite_number(value))
        else:
            check_control_value(self.coefficients_high_to_low, self.value_at_0p1)
        if self.intervals and len(self.intervals.get("coefficients", ())) not in (0, degree + 1):
            problem = f"expected one interval per coefficient ({degree + 1})"
            raise EntryError(problem, ("intervals", "coefficients"))


@dataclass(frozen=True, kw_only=True)
class Fit(Candidate):
    """The fit that is used, with the ones that were tried and why this one was chosen."""

    alternatives: tuple[Candidate, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Expert(Record):
    """A denoiser of the pipeline: fit and MagCache ratios per branch (pooled, cond, uncond).

    Ratios are one per step of the schedule: index = step, 1 at step 0.
    """

    recommended: Name | None = None
    branches: dict[Name, Fit] = field(default_factory=dict)
    mag_ratios: dict[Name, tuple[float, ...]] | None = None

    def _check(self) -> None:
        if self.branches and self.recommended not in self.branches:
            known = ", ".join(self.branches)
            problem = f"{self.recommended!r}: expected one of the branches {known}"
            raise EntryError(problem, ("recommended",))
        if self.recommended and not self.branches:
            raise EntryError(f"{self.recommended!r}, but there are no branches", ("recommended",))


@dataclass(frozen=True, kw_only=True)
class Threshold(Record):
    """What a threshold costs and gives with this entry's polynomial, and with no other."""

    threshold: Positive
    computed_steps: Annotated[float, Limits(0, MAX_STEPS)] | None = None
    num_steps: Steps | None = None
    speedup: Positive | None = None
    psnr_db: float | None = None
    snr_db: float | None = None
    ssim: float | None = None
    ms_ssim: float | None = None
    lpips: float | None = None
    latent_rel_l2: Positive | None = None
    worst_psnr_db: float | None = None
    kind: Literal["replay", "verified", "reported"]
    hardware: str | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Entry(Record):
    """A version of a model's calibration; construction checks it all and raises ``EntryError``.

    ``forecast`` and ``forecast_of`` say what a skipped step is made of under this entry's gate;
    nothing means reuse of the residual. With the target ``forecast_error`` (written by earlier
    versions only) the polynomial predicts the error of that forecast.
    """

    schema: int = SCHEMA
    model: Slug
    version: Annotated[int, Limits(0, 1_000_000)] = 0
    status: Literal["measured", "published", "copied"]
    copied_from: str | None = None
    title: str | None = None
    engine: str | None = None
    transformer_class: str | None = None
    pipeline_class: str | None = None
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    signal: SignalName
    signal_note: str | None = None
    target: Literal["output", "hidden", "residual", "forecast_error", "unknown"]
    forecast: Literal["reuse", "linear", "quadratic"] | None = None
    forecast_of: Literal["residual", "output"] | None = None
    sign_rule: Literal["clamp", "signed", "abs"] = "clamp"
    protocol: Protocol = field(default_factory=Protocol)
    experts: dict[Name, Expert]
    max_skips: Steps | None = None
    start: int | float | None = None
    end: int | float | None = None
    thresholds: tuple[Threshold, ...] = ()
    plans: tuple[Plan, ...] | None = None
    certificates: tuple[Certificate, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: str | None = None
    source: Source = field(default_factory=Source)

    def _check(self) -> None:
        if self.schema != SCHEMA:
            raise EntryError(f"{self.schema}: expected {SCHEMA}", ("schema",))
        if (self.status == "copied") != (self.copied_from is not None):
            problem = f"{self.copied_from!r} with status {self.status}"
            advice = "only a copied entry says from whom, and must"
            raise EntryError(f"{problem}: {advice}", ("copied_from",))
        extrapolates = self.forecast in ("linear", "quadratic") and self.forecast_of is not None
        if self.target == "forecast_error" and not extrapolates:
            problem = f"{self.forecast!r} of {self.forecast_of!r}"
            advice = (
                "the target is the error of a linear or quadratic forecast, of output or residual"
            )
            raise EntryError(f"{problem}, but {advice}", ("forecast",))
        if not self.experts:
            raise EntryError("no expert: expected at least transformer", ("experts",))
        fitted = any(expert.branches for expert in self.experts.values())
        if self.signal == "none" and fitted:
            raise EntryError("none, but there are coefficients: say what they compare", ("signal",))
        for name, expert in self.experts.items():
            if not (expert.branches or expert.mag_ratios or self.plans):
                problem = "no fit, no mag_ratios and no plan: nothing to use"
                raise EntryError(problem, ("experts", name))
        _check_window(self.start, "start")
        _check_window(self.end, "end")

    @property
    def label(self) -> str:
        return f"{self.model}@v{self.version}"

    def fit(self, expert: str = "transformer", branch: str | None = None) -> Fit:
        """The fit of a branch, or the recommended one where the branch has no fit of its own.

        Raises:
            EntryError: If the entry has no such expert, or only ratios or plans for it.
        """
        if expert not in self.experts:
            known = ", ".join(self.experts)
            raise EntryError(f"{self.label} has no expert {expert!r}: expected one of {known}")
        branches, recommended = self.experts[expert].branches, self.experts[expert].recommended
        if not branches or recommended is None:
            problem = f"{self.label} has no coefficients for {expert}, only mag_ratios or plans"
            raise EntryError(problem)
        return branches.get(branch or recommended, branches[recommended])


def _check_window(value: int | float | None, name: str) -> None:
    """A whole number counts steps, a number with a decimal point is a share of the schedule."""
    if isinstance(value, float) and not 0 <= value <= 1:
        expected = "a fraction of the schedule from 0.0 to 1.0, or a whole number of steps"
    elif isinstance(value, int) and not 0 <= value <= MAX_STEPS:
        expected = f"0 to {MAX_STEPS} steps, or a fraction from 0.0 to 1.0"
    else:
        return
    raise EntryError(f"{value}: expected {expected}", (name,))


def from_plain(data: Any) -> Entry:
    """The entry that plain data describes.

    Raises:
        EntryError: With the path of the first value that is unknown, missing, of a wrong type or
            out of range.
    """
    if not isinstance(data, dict):
        problem = "expected a mapping with the keys of an entry (schema, model, status, ...)"
        raise EntryError(problem)
    if data.get("schema") is None:
        raise EntryError(f"missing key schema: expected schema: {SCHEMA} as first line")
    number = data["schema"]
    if number != SCHEMA or isinstance(number, bool):
        problem = f"{str(number)[:40]}: this version reads schema {SCHEMA}; upgrade the toolkit"
        raise EntryError(problem, ("schema",))
    entry: Entry = fields.from_plain(data, Entry)
    return entry
