"""The entry: coefficients, their source and what they are worth, as frozen dataclasses.

The annotations below are the definition of the format.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from coeffs.entry.certificates import Certificate
from coeffs.entry.fields import (
    MAX_STEPS,
    Edge,
    Figures,
    Limits,
    Name,
    Names,
    Number,
    Numbers,
    Positive,
    Record,
    Slug,
    Steps,
    Text,
    checked,
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
from coeffs.errors import EntryError

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Candidate(Record):
    """One fitted polynomial with its domain and figures.

    ``value_at_0p1`` is the bare polynomial's value at x = 0.1. It is filled in when missing and
    compared when stored, so that a list pasted in the other order cannot be loaded.
    """

    coefficients_high_to_low: Numbers
    degree: Annotated[int, Limits(0, MAX_DEGREE)] = None  # type: ignore[assignment]  # filled in
    method: Literal["polyfit", "constrained", "published"] = "polyfit"
    value_at_0p1: Number = None
    domain: tuple[float, float] | None = None
    counts: Counts | None = None
    figures: Figures = None
    intervals: dict[Name, tuple[tuple[float, float], ...]] | None = None
    why: Text = None

    def polynomial(self, sign_rule: str = "clamp") -> Polynomial:
        """The polynomial under ``sign_rule`` (an entry's ``sign_rule``)."""
        return Polynomial(self.coefficients_high_to_low, self.domain, sign_rule)

    def _check(self) -> None:
        coefficients, stored = self.coefficients_high_to_low, self.value_at_0p1
        polynomial = self.polynomial()
        if self.degree not in (None, polynomial.degree):
            raise EntryError(
                f"{self.degree}, but {len(coefficients)} coefficients have degree "
                f"{polynomial.degree}: correct one of them",
                "degree",
            )
        object.__setattr__(self, "degree", polynomial.degree)
        if stored is None:
            check_order(coefficients, self.domain)
            value = checked(float, polynomial.raw(CONTROL_X))
            object.__setattr__(self, "value_at_0p1", value)
        else:
            check_control_value(coefficients, stored)
        intervals = (self.intervals or {}).get("coefficients")
        if intervals and len(intervals) != len(coefficients):
            raise EntryError(
                f"expected one interval per coefficient ({len(coefficients)})",
                "intervals",
                "coefficients",
            )


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
    mag_ratios: dict[Name, Numbers] | None = None

    def _check(self) -> None:
        if (self.branches or self.recommended) and self.recommended not in self.branches:
            known = ", ".join(self.branches) or "nothing, there are none"
            raise EntryError(
                f"{self.recommended!r}: expected one of the branches {known}", "recommended"
            )


@dataclass(frozen=True, kw_only=True)
class Threshold(Record):
    """What a threshold costs and gives with this entry's polynomial, and with no other."""

    threshold: Positive
    computed_steps: Annotated[float, Limits(0, MAX_STEPS)] | None = None
    num_steps: Steps | None = None
    speedup: Positive | None = None
    psnr_db: Number = None
    snr_db: Number = None
    ssim: Number = None
    ms_ssim: Number = None
    lpips: Number = None
    latent_rel_l2: Positive | None = None
    worst_psnr_db: Number = None
    kind: Literal["replay", "verified", "reported"]
    hardware: Text = None
    note: Text = None


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
    copied_from: Text = None
    title: Text = None
    engine: Text = None
    transformer_class: Text = None
    pipeline_class: Text = None
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    signal: SignalName
    signal_note: Text = None
    target: Literal["output", "hidden", "residual", "forecast_error", "unknown"]
    forecast: Literal["reuse", "linear", "quadratic"] | None = None
    forecast_of: Literal["residual", "output"] | None = None
    sign_rule: Literal["clamp", "signed", "abs"] = "clamp"
    protocol: Protocol = field(default_factory=Protocol)
    experts: dict[Name, Expert]
    max_skips: Steps | None = None
    start: Edge = None
    end: Edge = None
    thresholds: tuple[Threshold, ...] = ()
    plans: tuple[Plan, ...] | None = None
    certificates: tuple[Certificate, ...] = ()
    warnings: Names = ()
    notes: Text = None
    source: Source = field(default_factory=Source)

    def _check(self) -> None:
        if self.schema != SCHEMA:
            raise EntryError(f"{self.schema}: expected {SCHEMA}", "schema")
        if (self.status == "copied") != (self.copied_from is not None):
            raise EntryError(
                f"{self.copied_from!r} with status {self.status}: "
                "only a copied entry says from whom, and must",
                "copied_from",
            )
        if not self.experts:
            raise EntryError("no expert: expected at least transformer", "experts")
        for name, expert in self.experts.items():
            if expert.branches and self.signal == "none":
                raise EntryError(
                    "none, but there are coefficients: say what they compare", "signal"
                )
            if not (expert.branches or expert.mag_ratios or self.plans):
                raise EntryError(
                    "no fit, no mag_ratios and no plan: nothing to use", "experts", name
                )
        for name in ("start", "end"):
            value = getattr(self, name)
            # A whole number counts steps, a number with a decimal point is a share of the schedule.
            if value is not None and not 0 <= value <= (
                1 if isinstance(value, float) else MAX_STEPS
            ):
                raise EntryError(
                    f"{value}: expected a fraction of the schedule from 0.0 to 1.0, or whole steps",
                    name,
                )

    @property
    def label(self) -> str:
        return f"{self.model}@v{self.version}"

    @property
    def has_polynomials(self) -> bool:
        """Whether a gate can be made of it, and not only ratios or plans."""
        return any(expert.branches for expert in self.experts.values())

    @property
    def origin(self) -> str:
        return f"copied from {self.copied_from}" if self.copied_from else self.status

    def fit(self, expert: str = "transformer", branch: Text = None) -> Fit:
        """The fit of a branch, or the recommended one where the branch has no fit of its own.

        Raises:
            EntryError: If the entry has no such expert, or only ratios or plans for it.
        """
        if expert not in self.experts:
            raise EntryError(
                f"{self.label} has no expert {expert!r}: expected one of {', '.join(self.experts)}"
            )
        branches, recommended = (
            self.experts[expert].branches,
            self.experts[expert].recommended,
        )
        if recommended is None:
            raise EntryError(
                f"{self.label} has no coefficients for {expert}, only mag_ratios or plans"
            )
        return branches.get(branch or recommended, branches[recommended])


def from_plain(data: Any) -> Entry:
    """The entry that plain data describes.

    Raises:
        EntryError: With the path of the first value that is unknown, missing, of a wrong type or
            out of range.
    """
    number = data.get("schema") if isinstance(data, dict) else SCHEMA
    if number is None:
        raise EntryError(f"missing key schema: expected schema: {SCHEMA} as first line")
    if number != SCHEMA or isinstance(number, bool):
        raise EntryError(
            f"{str(number)[:40]}: this version reads schema {SCHEMA}; upgrade the toolkit",
            "schema",
        )
    entry: Entry = checked(Entry, data)
    return entry
