"""From what ``apply_tea_cache`` was given to what will be in force. Pure: no tensors, no torch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import coeffs
from coeffs.entry.signals import MODULATED_INPUT, SIGNALS
from coeffs.errors import CoeffsError, EntryMismatch
from coeffs.match import compare, find
from runtime.asked import OF_GATE, Asked, Model, check
from runtime.decide.choice import (
    best_for,
    certified_for,
    fewer_steps_advice,
    other_schedule,
    threshold_for,
)
from runtime.decide.forecast import Forecast
from runtime.decide.gate import FixedSchedule, Gate, GateConfig, Policy
from runtime.errors import InvalidSetting

LEVEL_TOLERANCE = 0.02  # of the largest noise level: a plan was made for levels this near


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is in force.

    Attributes:
        asked: What ``apply_tea_cache`` was given.
        policy: ``gate``, ``plan`` (of an entry) or ``schedule`` (a bare string).
        entry: The entry, if there is one.
        own: The caller's own polynomial, which takes the place of an entry's.
        gate: Settings of the gate; ``None`` where a schedule decides.
        num_steps: Length of the schedule that was measured or planned, where it is known.
        sigmas: Noise levels that the plan was made for.
        mismatches: In what the model differs from what the entry was measured on, known before it runs.
        certificate: What was promised, where a quality was asked for.
        advice: What does better than what was chosen by its speed-up or quality, if its figures say so.
    """

    asked: Asked
    forecast: Forecast
    forecast_of: str
    policy: str = "gate"
    entry: "coeffs.Entry | None" = None
    own: "coeffs.Polynomial | None" = None
    signal: str = MODULATED_INPUT.name
    gate: GateConfig | None = None
    schedule: str | None = None
    num_steps: int | None = None
    sigmas: tuple[float, ...] = ()
    mismatches: tuple[str, ...] = ()
    certificate: "coeffs.Certificate | None" = None
    advice: str | None = None

    @property
    def branches(self) -> str:
        """Whether CFG branches decide ``together`` or ``apart``."""
        return self.asked.branches or ("apart" if self.asked.compat else "together")

    @property
    def label(self) -> str | None:
        return self.entry.label if self.entry else None

    def new_policy(self, expert: str, branch: str) -> Policy:
        """The policy of one branch of one expert; its own polynomial where the entry has one."""
        if self.gate is None:
            return FixedSchedule(self.schedule or "")
        entry, polynomial = self.entry, self.own
        if entry is not None:
            polynomial = entry.fit(expert, branch).polynomial(entry.sign_rule)
        assert polynomial is not None
        return Gate(polynomial, self.gate)

    def described(self) -> dict[str, Any]:
        """What the handle tells its user."""
        described = {
            "policy": self.policy,
            "entry": self.label,
            "signal": self.signal,
            "threshold": self.gate.threshold if self.gate else None,
            "schedule": self.schedule,
            "compat": self.asked.compat,
            "branches": self.branches,
            "forecast": self.forecast.kind,
            "forecast_of": self.forecast_of,
            "quality": self.asked.quality,
            "promise": self.certificate.promise if self.certificate else None,
        }
        return described if self.advice is None else described | {"advice": self.advice}

    def difference(
        self, num_steps: int | None, level: Callable[[int], float | None]
    ) -> str | None:
        """In what a generation of ``num_steps`` differs from what was measured or planned, if it does.

        Args:
            level: Noise level of a step; ``None`` where the scheduler tells none.

        Raises:
            InvalidSetting: Something differs and the settings are strict.
        """
        difference = None
        tolerance = LEVEL_TOLERANCE * max(map(abs, self.sigmas), default=0.0)
        for step, planned in enumerate(self.sigmas):
            here = level(step)
            if here is not None and abs(here - planned) > tolerance:
                difference = (
                    f"sigma of step {step}: {planned:.4g} in the plan, {here:.4g} here"
                )
                break
        measured_steps = self.num_steps if self.gate or self.certificate else None
        if None not in (num_steps, measured_steps) and num_steps != measured_steps:
            difference = f"num_steps: {measured_steps} in the entry, {num_steps} here"
        if difference and self.asked.strict:
            made = "measured like" if self.gate else "planned for"
            raise InvalidSetting(
                f"{self.label or 'the plan'} was not {made} this: {difference}; calibrate at these settings, "
                "or pass strict=False"
            )
        return difference


def resolve(asked: Asked, model: Model) -> Settings:
    """What will be in force on ``model``.

    Raises:
        InvalidSetting: Settings that exclude each other or cannot be used.
        coeffs.errors.CoeffsError: No entry fits.
    """
    check(asked, model)
    entry = asked.entry
    if not isinstance(entry, coeffs.Entry | None):
        entry = coeffs.load(entry)
    forecast = asked.forecast or "reuse"
    settings = Settings(
        asked=asked,
        entry=entry,
        forecast=forecast if isinstance(forecast, Forecast) else Forecast(forecast),
        forecast_of=asked.forecast_of or "residual",
    )
    choice: str | float | coeffs.Plan | None = asked.schedule
    if choice is None:
        settings = _sourced(settings, model)
        choice = _choice(settings)
    if isinstance(choice, str | coeffs.Plan):
        settings = _planned(settings, choice)
    elif choice is not None:
        settings = _gated(settings, choice, model)
    if settings.forecast_of == "guided":
        _check_guided(settings, model)
    for expert in model.classes:
        settings.new_policy(expert, "")  # an unusable policy shows before anything is hooked
    return settings


def for_steps(settings: Settings, model: Model, num_steps: int | None) -> Settings:
    """What will be in force for a generation of ``num_steps``, which is known only once it runs.

    Where no entry was named, one that was measured at this number of steps takes over, if it can
    be watched and followed in the same way.
    """
    asked = settings.asked
    named = asked.given("entry", "coefficients", "schedule", "quality")
    if named or settings.forecast_of == "guided" or num_steps in (None, settings.num_steps):
        return settings
    facts = {**model.facts, "num_steps": num_steps}
    try:
        other = resolve(asked, replace(model, facts=facts))
    except (CoeffsError, InvalidSetting):
        return settings  # what differs is said, as for a named entry
    watched = (num_steps, settings.signal, settings.forecast_of)
    same = (other.num_steps, other.signal, other.forecast_of) == watched
    return other if same else settings


def _check_guided(settings: Settings, model: Model) -> None:
    if not model.has_scheduler:
        raise InvalidSetting(
            "forecast_of='guided' forecasts what a pipeline's scheduler receives, and a bare denoiser has none: "
            "apply it to the pipeline, or use forecast_of='output'"
        )
    if settings.branches != "together":
        raise InvalidSetting(
            "forecast_of='guided' is of all branches together: leave branches= and compat= out"
        )


def _sourced(settings: Settings, model: Model) -> Settings:
    """With the polynomials of a gate: the caller's own, those of a named entry, or of the one that fits the model."""
    asked, entry = settings.asked, settings.entry
    if asked.coefficients is not None:
        own = coeffs.Polynomial(
            tuple(asked.coefficients), asked.domain, asked.sign_rule or "clamp"
        )
        return replace(settings, own=own, signal=_watchable(asked.signal or settings.signal))
    if entry is None:
        entry = find(model.facts).entry
    else:
        model.check_class(entry)
    if entry.forecast is not None or entry.target == "forecast_error":
        raise InvalidSetting(
            f"{entry.label} was fitted to the error of a forecast, which no gate follows any more: fit its run again, "
            "or give one of its plans as schedule="
        )
    mismatches: list[str] = []
    if asked.quality is not None:
        certificate, advice = certified_for(entry, asked.quality)
        # As the certified runs were: published sets decide as published.
        asked = replace(
            asked, compat=entry.status != "measured", strict=asked.strict is not False
        )
        settings = replace(settings, asked=asked, certificate=certificate, advice=advice)
        entry = replace(
            entry, protocol=certificate.protocol, status="measured", copied_from=None
        )
        mismatches = other_schedule(certificate, model.facts)
    mismatches = [*compare(entry, model.facts)[0], *mismatches]
    if asked.strict and mismatches:
        raise EntryMismatch(
            f"{entry.label} was not measured like this: {'; '.join(mismatches)}; calibrate at these settings, "
            "or pass strict=False"
        )
    signal = _watchable(entry.signal)
    return replace(settings, entry=entry, signal=signal, mismatches=tuple(mismatches))


def _watchable(signal: str) -> str:
    if signal not in SIGNALS:
        raise InvalidSetting(
            f"signal {signal!r}: the runtime can watch {' or '.join(SIGNALS)}; use another entry"
        )
    return signal


def _choice(settings: Settings) -> "float | coeffs.Plan | None":
    """The gate's threshold, or the plan that takes its place: as asked for, verified or certified."""
    asked, entry, certificate = settings.asked, settings.entry, settings.certificate
    if certificate is not None:
        return certificate.plan or certificate.threshold
    if asked.speedup is None or entry is None:
        return asked.threshold
    gate_only = asked.given(*OF_GATE, "forecast", "forecast_of", "branches")
    return (threshold_for if gate_only else best_for)(entry, asked.speedup)


def _planned(settings: Settings, schedule: "str | coeffs.Plan") -> Settings:
    """With a schedule instead of a gate; a plan's own forecast, unless the caller gave another."""
    asked, forecast, forecast_of = settings.asked, settings.forecast, settings.forecast_of
    plan, policy = schedule, "plan"
    if isinstance(plan, str):
        plan, policy = coeffs.Plan(schedule=FixedSchedule(plan).schedule), "schedule"
    if asked.forecast is None:
        forecast = Forecast.of_plan(plan)
        forecast_of = asked.forecast_of or plan.forecast_of or "residual"
    return replace(
        settings,
        policy=policy,
        signal=MODULATED_INPUT.name,
        forecast=forecast.planned_for(plan.schedule),
        forecast_of=forecast_of,
        schedule=plan.schedule,
        num_steps=len(plan.schedule),
        sigmas=plan.sigmas or (),
        advice=fewer_steps_advice(plan) if asked.speedup else settings.advice,
    )


def _gated(settings: Settings, threshold: float, model: Model) -> Settings:
    """With a gate at ``threshold``, its window and cap as asked for, else as the entry states them."""
    asked, entry = settings.asked, settings.entry
    length_known = model.has_scheduler or asked.num_steps is not None
    window: dict[str, Any] = {"start": 1, "end": int(length_known), "max_skips": None}
    for name in window:
        stated = getattr(entry, name, None)
        window[name] = window[name] if stated is None else stated
    window |= {name: getattr(asked, name) for name in asked.given(*window)}
    gate = GateConfig(threshold=threshold, compat=asked.compat, **window)
    if gate.needs_num_steps and not length_known:
        raise InvalidSetting(
            "a bare denoiser has no scheduler to ask for the number of steps: give num_steps=..., or start as a "
            "count and end=0"
        )
    return replace(settings, gate=gate, num_steps=entry.protocol.num_steps if entry else None)
