"""What an entry offers a model: polynomials for a gate, a threshold or a plan for a speed-up. Pure: no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import coeffs
from coeffs.entry.polynomial import Polynomial
from coeffs.entry.signals import SIGNALS
from coeffs.errors import EntryMismatch
from coeffs.match import compare, find
from runtime.decide.forecast import Forecast
from runtime.errors import InvalidSetting

NOISE_DB = 0.3  # differences of means below it are not told apart by a plan's few prompts
SECOND_ORDER = "fewer_steps_second_order_solver"  # how a plan's figures name that rival
FROM_ENTRY: Any = "entry"  # default of max_skips, where None lifts the cap


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The arguments of ``apply_tea_cache``, which documents them; ``None`` where nothing was said."""

    entry: "coeffs.Entry | str | None" = None
    threshold: float | None = None
    speedup: float | None = None
    schedule: "str | coeffs.Plan | None" = None
    coefficients: Sequence[float] | None = None
    domain: tuple[float, float] | None = None
    sign_rule: str | None = None
    signal: str | None = None
    start: int | float | None = None
    end: int | float | None = None
    max_skips: int | None = FROM_ENTRY
    num_steps: int | None = None
    forecast: str | Forecast | None = None
    forecast_of: str | None = None
    branches: str | None = None
    offload: bool = False
    compat: bool = False
    strict: bool = False

    def refuse(self, reason: str, *names: str) -> None:
        """Refuse those of the settings ``names`` that were given."""
        for name in names:
            value = getattr(self, name)
            unset = (FROM_ENTRY,) if name == "max_skips" else (None, False)
            if not any(value is nothing for nothing in unset):
                raise InvalidSetting(f"{name}= {reason}")


@dataclass(frozen=True, kw_only=True)
class Model:
    """Plain facts about what the cache is applied to.

    Attributes:
        facts: In the registry's words, for :func:`coeffs.find`.
        classes: Class names of the denoisers by component name.
        has_scheduler: Whether there is a scheduler to ask for steps and noise levels; a bare denoiser has none.
    """

    facts: Mapping[str, Any]
    classes: Mapping[str, str]
    has_scheduler: bool


@dataclass(frozen=True)
class Source:
    """Where a gate's polynomials come from: an entry, or coefficients of the caller's own."""

    signal: str
    entry: "coeffs.Entry | None" = None
    own: Polynomial | None = None
    mismatches: tuple[str, ...] = ()

    @property
    def label(self) -> str | None:
        return None if self.entry is None else self.entry.label

    def stated(self, name: str, default: Any = None) -> Any:
        """A field of the entry, or ``default`` where it says nothing."""
        value = getattr(self.entry, name, None)
        return default if value is None else value

    def polynomial(self, expert: str, branch: str) -> Polynomial:
        """The branch's own polynomial where the entry has one, else the recommended one."""
        if self.entry is None:
            assert self.own is not None
            return self.own
        return self.entry.fit(expert, branch).polynomial(self.entry.sign_rule)


def source_of(asked: Asked, model: Model) -> Source:
    if asked.coefficients is not None:
        if asked.entry is not None:
            raise InvalidSetting("entry and coefficients given: expected one of them")
        own = Polynomial(tuple(asked.coefficients), asked.domain, asked.sign_rule or "clamp")
        return Source(_watchable(asked.signal or "modulated_input"), own=own)
    asked.refuse(
        "belongs to coefficients=; an entry brings its own", "domain", "sign_rule", "signal"
    )
    if asked.entry is None:
        entry = find(model.facts, strict=asked.strict).entry
    else:
        entry = loaded(asked.entry)
        _check_class(entry, model)
    if entry.forecast is not None or entry.target == "forecast_error":
        raise InvalidSetting(
            f"{entry.label} was fitted to the error of a forecast, which no gate follows any more: fit its run again, "
            "or give one of its plans as schedule="
        )
    differences = tuple(map(str, compare(entry, model.facts)[0]))
    if asked.strict and differences:
        raise EntryMismatch(
            f"{entry.label} was not measured like this: {'; '.join(differences)}; leave strict out"
        )
    return Source(_watchable(entry.signal), entry, mismatches=differences)


def loaded(entry: "coeffs.Entry | str") -> "coeffs.Entry":
    return entry if isinstance(entry, coeffs.Entry) else coeffs.load(entry)


def _check_class(entry: "coeffs.Entry", model: Model) -> None:
    stated, classes = entry.transformer_class, set(model.classes.values())
    if stated and stated.split()[0] not in classes:
        raise InvalidSetting(
            f"{entry.label} is for {stated}, this model is {', '.join(sorted(classes))}: "
            "use an entry for this class, or pass its numbers as coefficients=[...] if you mean to"
        )


def _watchable(signal: str) -> str:
    if signal not in SIGNALS:
        raise InvalidSetting(
            f"signal {signal!r}: the runtime can watch {' or '.join(SIGNALS)}; use another entry"
        )
    return signal


def threshold_for(entry: "coeffs.Entry | None", speedup: float) -> float:
    """The lowest verified threshold of ``entry`` that reaches ``speedup``, between table rows by interpolation.

    Raises:
        InvalidSetting: The entry has no measured speed-ups, or none as high.
    """
    if entry is None:
        raise InvalidSetting(
            "speedup= needs a registry entry with verified thresholds; give threshold= instead"
        )
    rows = sorted((reached, row.threshold) for reached, row in _verified(entry))
    if not rows:
        raise InvalidSetting(
            f"{entry.label} has no verified speed-ups: run `calibrate verify` on it, or give threshold= instead"
        )
    if not 1 <= speedup <= rows[-1][0]:
        raise InvalidSetting(
            f"speedup {speedup}: {entry.label} was verified from 1 to {rows[-1][0]:.2f}; choose one of those"
        )
    rows.insert(0, (1.0, 0.0))
    for (slower, low), (faster, high) in pairwise(rows):
        if speedup <= faster:
            share = (speedup - slower) / (faster - slower) if faster > slower else 1.0
            return low + share * (high - low)
    raise AssertionError("the last row is at least as fast")


def best_for(entry: "coeffs.Entry | None", speedup: float) -> "float | coeffs.Plan":
    """The gate's threshold or the plan of ``entry`` that verified best among those that reach ``speedup``.

    Both are judged by what was measured at this speed-up or a higher one.

    Raises:
        InvalidSetting: Neither was verified at this speed-up.
    """
    plans = [
        (_fidelity(plan.figures), plan)
        for plan in (entry.plans if entry else None) or ()
        if ((plan.figures or {}).get("speedup") or 0) >= speedup >= 1
    ]
    fidelity, plan = max(plans, key=lambda rated: rated[0], default=(-math.inf, None))
    try:
        threshold = threshold_for(entry, speedup)
    except InvalidSetting:
        if plan is None:
            raise
        return plan
    assert entry is not None
    fast_enough = [(reached, row) for reached, row in _verified(entry) if reached >= speedup]
    _, gate = min(fast_enough, key=lambda row: row[0])
    if plan is None or (gate.psnr_db is not None and gate.psnr_db >= fidelity):
        return threshold
    return plan


def fewer_steps_advice(plan: "coeffs.Plan") -> str | None:
    """What to do instead of a plan, where fewer steps without a cache was measured better; else None."""
    figures = plan.figures or {}
    for measure in ("psnr_db", "snr_db"):
        own = figures.get(measure)
        names = (f"fewer_steps_{measure}", f"{SECOND_ORDER}_{measure}")
        rivals = {name: figures.get(name) or -math.inf for name in names}
        best = max(names, key=rivals.__getitem__)
        if own is not None and rivals[best] > own + NOISE_DB:
            solver = " and DPM-Solver++ of order 2" if best.startswith(SECOND_ORDER) else ""
            return (
                f"use fewer steps instead: num_inference_steps={plan.computed_steps}{solver} without a cache gave "
                f"{rivals[best]:.1f} dB, this plan {own:.1f} dB"
            )
    return None


def _verified(entry: "coeffs.Entry") -> list[tuple[float, "coeffs.Threshold"]]:
    """Measured speed-up and row of the thresholds that have one."""
    return [
        (row.speedup, row)
        for row in entry.thresholds or ()
        if row.kind == "verified" and row.speedup is not None
    ]


def _fidelity(figures: Mapping[str, float | None] | None) -> float:
    """PSNR in dB, SNR for sound; minus infinity where nothing was measured."""
    measured = figures or {}
    for name in ("psnr_db", "snr_db"):
        value = measured.get(name)
        if value is not None:
            return value
    return -math.inf
