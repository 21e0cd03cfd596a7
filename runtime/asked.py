"""What ``apply_tea_cache`` was given, and what it is applied to. Pure: no tensors, no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import coeffs
from runtime.decide.forecast import Forecast
from runtime.errors import InvalidSetting

FROM_ENTRY: Any = "entry"  # default of max_skips, where None lifts the cap
# Arguments with few values -> all of them.
_VALUES = {
    "forecast_of": ("residual", "output", "guided"),
    "branches": ("together", "apart"),
}
_OF_COEFFICIENTS = ("domain", "sign_rule", "signal")
# Beside a speed-up they take the gate; beside a schedule they mean nothing.
OF_GATE = ("start", "end", "max_skips", "compat")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The arguments of ``apply_tea_cache``, which documents them; ``None`` where nothing was said."""

    entry: "coeffs.Entry | str | None" = None
    threshold: float | None = None
    speedup: float | None = None
    schedule: "str | coeffs.Plan | None" = None
    quality: str | None = None
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
    strict: bool | None = None

    def given(self, *names: str) -> list[str]:
        """Those of the arguments ``names`` that are not at their default."""
        return [name for name in names if getattr(self, name) is not getattr(Asked, name)]


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

    def check_class(self, entry: "coeffs.Entry") -> None:
        """Refuse an entry of another transformer class."""
        stated, classes = entry.transformer_class, set(self.classes.values())
        if stated and stated.split()[0] not in classes:
            raise InvalidSetting(
                f"{entry.label} is for {stated}, this model is {', '.join(sorted(classes))}: "
                "use an entry for this class, or pass its numbers as coefficients=[...] if you mean to"
            )


def check(asked: Asked, model: Model) -> None:
    """Refuse arguments that exclude each other.

    Raises:
        InvalidSetting: Which of them, and what to do about it.
    """
    chosen = asked.given("threshold", "speedup", "schedule", "quality")
    if len(chosen) != 1:
        given = " and ".join(chosen) or "none of them"
        raise InvalidSetting(
            f"{given} given: expected exactly one of threshold=, speedup=, schedule=, quality="
        )
    fixed = "has no meaning beside schedule=, which fixes every step; leave it out"
    certified = (
        "has no meaning beside quality=, which fixes it as it was certified; leave it out"
    )
    compat = "has no meaning beside compat=True, which fixes it"
    own = asked.coefficients is not None
    # Whether a rule applies -> why it refuses -> which arguments.
    rules = (
        (
            asked.quality is not None,
            certified,
            ("coefficients", *OF_GATE, "forecast", *_VALUES),
        ),
        (asked.schedule is not None, fixed, ("coefficients", *_OF_COEFFICIENTS, *OF_GATE)),
        # Only a plan states noise levels that could be strict.
        (isinstance(asked.schedule, str) and asked.strict, fixed, ("strict",)),
        (not own, "belongs to coefficients=; an entry brings its own", _OF_COEFFICIENTS),
        (
            own,
            "needs a registry entry with verified thresholds; give threshold= instead",
            ("speedup",),
        ),
        (
            model.has_scheduler,
            "is for a bare denoiser; a pipeline's scheduler tells it, leave it out",
            ("num_steps",),
        ),
        (asked.compat, compat, ("start", "end")),
        (asked.compat and asked.max_skips is not None, compat, ("max_skips",)),
    )
    for applies, reason, names in rules:
        refused = asked.given(*names) if applies else []
        if refused:
            raise InvalidSetting(f"{refused[0]}= {reason}")
    if own and asked.entry is not None:
        raise InvalidSetting("entry and coefficients given: expected one of them")
    if asked.quality is not None and not model.has_scheduler and asked.num_steps is None:
        raise InvalidSetting(
            "quality= is certified for a number of steps, and a bare denoiser does not tell its own: give num_steps=, "
            "or apply it to the pipeline"
        )
    for name, values in _VALUES.items():
        value = getattr(asked, name)
        if value not in (None, *values):
            raise InvalidSetting(f"{name} {value!r}: expected {', '.join(values)}")
