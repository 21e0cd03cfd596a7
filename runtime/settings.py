"""From what ``apply_tea_cache`` was given to what will be in force. Pure: no tensors, no torch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import coeffs
from coeffs.errors import CoeffsError
from runtime.decide.forecast import Forecast
from runtime.decide.gate import FixedSchedule, Gate, GateConfig, Policy
from runtime.errors import InvalidSetting
from runtime.source import (
    FROM_ENTRY,
    Asked,
    Model,
    Source,
    best_for,
    fewer_steps_advice,
    loaded,
    source_of,
    threshold_for,
)

FORECAST_OF = ("residual", "output", "guided")
BRANCHES = ("together", "apart")
LEVEL_TOLERANCE = 0.02  # of the largest noise level: a plan was made for levels this near


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is in force.

    Attributes:
        asked: What ``apply_tea_cache`` was given; ``threshold`` is the one in force.
        policy: ``gate``, ``plan`` (of an entry) or ``schedule`` (a bare string).
        entry: Label of the entry, if there is one.
        gate: Settings of the gate; ``None`` where a schedule decides.
        source: The gate's polynomials.
        mismatches: In what the model differs from what the entry was measured on, known before it runs.
        num_steps: Length of the schedule that the entry was measured on, where it matters.
        sigmas: Noise levels that the plan was made for.
        advice: What does better than a plan that was chosen by its speed-up, if its figures say so.
    """

    asked: Asked
    policy: str
    entry: str | None
    signal: str
    forecast: Forecast
    forecast_of: str
    schedule: str | None = None
    gate: GateConfig | None = None
    source: Source | None = None
    mismatches: tuple[str, ...] = ()
    num_steps: int | None = None
    sigmas: tuple[float, ...] | None = None
    advice: str | None = None

    @property
    def branches(self) -> str:
        """Whether CFG branches decide ``together`` or ``apart``."""
        return self.asked.branches or ("apart" if self.asked.compat else "together")

    def new_policy(self, expert: str, branch: str) -> Policy:
        """The policy of one branch of one expert."""
        if self.gate is None or self.source is None:
            return FixedSchedule(self.schedule or "")
        return Gate(self.source.polynomial(expert, branch), self.gate)

    def described(self) -> dict[str, Any]:
        """What the handle tells its user."""
        described = {
            "policy": self.policy,
            "entry": self.entry,
            "signal": self.signal,
            "threshold": self.asked.threshold,
            "schedule": self.schedule,
            "compat": self.asked.compat,
            "branches": self.branches,
            "forecast": self.forecast.kind,
            "forecast_of": self.forecast_of,
        }
        return described if self.advice is None else described | {"advice": self.advice}

    def differences(self, num_steps: int | None, level: Callable[[int], float | None]) -> list[str]:
        """In what a generation of ``num_steps`` differs from what was measured or planned.

        Args:
            level: Noise level of a step; ``None`` where the scheduler tells none.

        Raises:
            InvalidSetting: Something differs and the settings are strict.
        """
        differences = []
        if self.sigmas is not None:
            levels = [level(step) for step in range(len(self.sigmas))]
            differences += self._differing_levels(self.sigmas, levels)
        if self.num_steps is not None and num_steps not in (None, self.num_steps):
            text = f"num_steps: {self.num_steps} in the entry, {num_steps} here"
            self._refuse(text, "measured like this", f"calibrate at {num_steps} steps")
            differences.append(text)
        return differences

    def _differing_levels(self, stated: tuple[float, ...], levels: list[float | None]) -> list[str]:
        tolerance = LEVEL_TOLERANCE * max(map(abs, stated))
        for step, (planned, here) in enumerate(zip(stated, levels, strict=True)):
            if here is not None and abs(here - planned) > tolerance:
                text = f"sigma of step {step}: {planned:.4g} in the plan, {here:.4g} here"
                self._refuse(text, "planned for this schedule", "plan at these settings")
                return [text]
        return []

    def _refuse(self, difference: str, made: str, advice: str) -> None:
        if self.asked.strict:
            whose = self.entry or "the plan"
            raise InvalidSetting(f"{whose} was not {made}: {difference}; {advice}")


def resolve(asked: Asked, model: Model) -> Settings:
    """What will be in force on ``model``.

    Raises:
        InvalidSetting: Settings that exclude each other or cannot be used.
        coeffs.errors.CoeffsError: No entry fits.
    """
    _check(asked, model)
    if asked.schedule is not None:
        label = None if asked.entry is None else loaded(asked.entry).label
        settings = _planned(asked, asked.schedule, label)
    else:
        source = source_of(asked, model)
        choice = asked.threshold if asked.speedup is None else _for_speedup(asked, source)
        if isinstance(choice, coeffs.Plan):
            settings = _planned(asked, choice, source.label)
            advice = fewer_steps_advice(choice)
            settings = replace(settings, mismatches=source.mismatches, advice=advice)
        else:
            settings = _gated(replace(asked, threshold=choice), source, model)
    if settings.forecast_of == "guided":
        _check_guided(settings, model)
    for expert in model.classes:
        settings.new_policy(expert, "")  # an unusable policy shows before anything is hooked
    return settings


def for_steps(settings: Settings, asked: Asked, model: Model, num_steps: int | None) -> Settings:
    """What will be in force for a generation of ``num_steps``, which is known only once it runs.

    Where no entry was named, one that was measured at this number of steps takes over, if it can
    be watched and followed in the same way.
    """
    named = asked.entry is not None or asked.coefficients is not None or asked.schedule is not None
    known = settings.num_steps or len(settings.schedule or "")
    if named or num_steps in (None, known) or settings.forecast_of == "guided":
        return settings
    facts = {**model.facts, "num_steps": num_steps}
    try:
        other = resolve(asked, replace(model, facts=facts))
    except (CoeffsError, InvalidSetting):
        return settings  # what differs is said, as for a named entry
    same_steps = num_steps in (other.num_steps, len(other.schedule or ""))
    same_watch = (other.signal, other.forecast_of) == (settings.signal, settings.forecast_of)
    return other if same_steps and same_watch else settings


def _check(asked: Asked, model: Model) -> None:
    choices = ("threshold", "speedup", "schedule")
    chosen = [name for name in choices if getattr(asked, name) is not None]
    if len(chosen) != 1:
        given = " and ".join(chosen) or "none of them"
        raise InvalidSetting(
            f"{given} given: expected exactly one of {', '.join(f'{name}=' for name in choices)}"
        )
    if asked.num_steps is not None and model.has_scheduler:
        raise InvalidSetting(
            "num_steps= is for a bare denoiser; a pipeline's scheduler tells it, leave it out"
        )
    if asked.compat and not (
        asked.start is asked.end is None and asked.max_skips in (FROM_ENTRY, None)
    ):
        raise InvalidSetting(
            "start=, end= and max_skips= have no meaning beside compat=True, which fixes them"
        )
    if asked.forecast_of not in (None, *FORECAST_OF):
        raise InvalidSetting(
            f"forecast_of {asked.forecast_of!r}: expected {', '.join(FORECAST_OF)}"
        )
    if asked.branches not in (None, *BRANCHES):
        raise InvalidSetting(f"branches {asked.branches!r}: expected {' or '.join(BRANCHES)}")


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


def _for_speedup(asked: Asked, source: Source) -> "float | coeffs.Plan":
    of_gate = (asked.start, asked.end, asked.forecast, asked.forecast_of, asked.branches)
    gate_only = (
        asked.compat
        or asked.max_skips is not FROM_ENTRY
        or any(setting is not None for setting in of_gate)
    )
    choose = threshold_for if gate_only else best_for
    assert asked.speedup is not None
    return choose(source.entry, asked.speedup)


def _planned(asked: Asked, schedule: "str | coeffs.Plan", label: str | None) -> Settings:
    plan = schedule if isinstance(schedule, coeffs.Plan) else None
    names = ["coefficients", "domain", "sign_rule", "signal", "start", "end", "max_skips", "compat"]
    if plan is None:
        names.append("strict")  # only a plan states noise levels that could be strict
    asked.refuse("has no meaning beside schedule=, which fixes every step; leave it out", *names)
    forecast, forecast_of = asked.forecast, asked.forecast_of
    if plan is not None and forecast is None:
        forecast = Forecast(plan.forecast or "reuse", plan.weights_by_step)
        forecast_of = forecast_of or plan.forecast_of
    pattern = schedule if isinstance(schedule, str) else schedule.schedule
    return Settings(
        asked=asked,
        policy="schedule" if plan is None else "plan",
        entry=label,
        signal="modulated_input",
        forecast=_forecast(forecast).planned_for(pattern),
        forecast_of=forecast_of or "residual",
        schedule=pattern,
        sigmas=None if plan is None else plan.sigmas,
    )


def _gated(asked: Asked, source: Source, model: Model) -> Settings:
    length_known = model.has_scheduler or asked.num_steps is not None
    assert asked.threshold is not None
    config = GateConfig(
        threshold=asked.threshold,
        start=source.stated("start", 1) if asked.start is None else asked.start,
        end=source.stated("end", int(length_known)) if asked.end is None else asked.end,
        max_skips=source.stated("max_skips") if asked.max_skips is FROM_ENTRY else asked.max_skips,
        compat=asked.compat,
    )
    if config.needs_num_steps and not length_known:
        raise InvalidSetting(
            "a bare denoiser has no scheduler to ask for the number of steps: give num_steps=..., or start as a "
            "count and end=0"
        )
    return Settings(
        asked=asked,
        policy="gate",
        entry=source.label,
        signal=source.signal,
        forecast=_forecast(asked.forecast),
        forecast_of=asked.forecast_of or "residual",
        gate=config,
        source=source,
        mismatches=source.mismatches,
        num_steps=source.entry.protocol.num_steps if source.entry else None,
    )


def _forecast(given: str | Forecast | None) -> Forecast:
    return given if isinstance(given, Forecast) else Forecast(given or "reuse")
