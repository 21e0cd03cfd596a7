"""``apply_tea_cache``: settings resolved and checked first, hooks installed last, all or none."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

import coeffs
from runtime.cache import CacheHandler
from runtime.compat.diffusers_private import enabled_cache, unwrapped
from runtime.decide.forecast import Forecast
from runtime.decide.gate import FixedSchedule, Gate, GateConfig, GuardedSchedule, Policy
from runtime.errors import ApplyError, InvalidSetting, UnsupportedModel
from runtime.settings import Source, loaded
from runtime.speedup import best_for, threshold_for
from runtime.stats import Stats
from runtime.watch.hooks import StackHooks
from runtime.watch.scheduler import Locator, SchedulerClock

LEVEL_TOLERANCE = 0.02  # of the largest noise level: a plan was made for levels this near
_DENOISER = re.compile(r"^(transformer|denoiser|dit)(_\d+)?$")
_FROM_ENTRY: Any = "entry"


def denoisers(target: Any) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by component name (two for two-expert models); a module is ``transformer``.

    Raises:
        UnsupportedModel: The pipeline has no transformer.
    """
    if isinstance(target, nn.Module):
        return {"transformer": unwrapped(target)}
    components = getattr(target, "components", None)
    if not isinstance(components, dict):
        raise UnsupportedModel(
            f"{type(target).__name__}: expected a diffusers pipeline, or the denoiser itself as a torch module"
        )
    found = {
        name: unwrapped(module)
        for name, module in components.items()
        if _DENOISER.match(name) and isinstance(module, nn.Module)
    }
    if not found:
        raise UnsupportedModel(
            f"{type(target).__name__}: none of its components ({', '.join(components)}) is a diffusion transformer; "
            "pass the denoiser itself"
        )
    return found


class TeaCache:
    """An applied cache: statistics, reset, removal. Made by :func:`apply_tea_cache`; a context manager.

    Attributes:
        stats: What was computed and skipped (:class:`runtime.stats.Stats`).
        settings: What is in force: the entry's label, signal, threshold or schedule.
        mismatches: In what this pipeline differs from what the entry was measured on, in words; the number of steps
            joins when a generation shows it.
    """

    def __init__(self, target: Any, settings: dict[str, Any]) -> None:
        self.stats = Stats()
        self.settings = settings
        self.mismatches: list[str] = []
        self._target = target
        self._parts: list[tuple[StackHooks, CacheHandler]] = []
        self._free: Callable[[], Any] | None = None

    def reset(self) -> None:
        """Forget the generation under way; the next denoiser call begins a new one. Statistics stay."""
        for _, handler in self._parts:
            handler.reset()

    def remove(self) -> None:
        """Take the cache off; the model gives the same results as before. Harmless when it is off already."""
        for hooks, handler in self._parts:
            hooks.remove()
            handler.reset()
        self._parts.clear()
        if (
            self._free is not None
            and self._target.__dict__.get("maybe_free_model_hooks") is self._free
        ):
            del self._target.__dict__["maybe_free_model_hooks"]
        self._free = None

    def __enter__(self) -> "TeaCache":
        self.reset()
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def apply_tea_cache(
    target: Any,
    entry: "coeffs.Entry | str | None" = None,
    *,
    threshold: float | None = None,
    speedup: float | None = None,
    schedule: "str | coeffs.Plan | None" = None,
    guard: float | None = None,
    coefficients: Sequence[float] | None = None,
    domain: tuple[float, float] | None = None,
    sign_rule: str | None = None,
    signal: str | None = None,
    start: int | float | None = None,
    end: int | float | None = None,
    max_skips: int | None = _FROM_ENTRY,
    num_steps: int | None = None,
    forecast: str | Forecast | None = None,
    forecast_of: str | None = None,
    branches: str | None = None,
    offload: bool = False,
    compat: bool = False,
    strict: bool = False,
    blocks: Sequence[str | nn.Module] | None = None,
) -> TeaCache:
    """Apply TeaCache to a diffusers pipeline or to a bare denoiser.

    Exactly one of ``threshold``, ``speedup`` and ``schedule`` says how much to skip.

    Args:
        target: A pipeline (all its denoisers are hooked), or the denoiser module.
        entry: A registry entry or its name; ``None`` finds the one that fits the model, unless ``coefficients`` or
            a ``schedule`` are given.
        threshold: Skip while the accumulated predicted change is below it; 0 computes every step.
        speedup: What verified best at this speed-up: the entry's gate at a threshold, or one of its plans; the
            handle's ``settings["policy"]`` says which. Settings of the gate beside it take the gate.
        schedule: A fixed plan, one letter per denoising step: ``C`` computes, ``S`` skips; or one of an entry's
            ``plans``, which brings its forecast. Other noise levels than it was made for are a mismatch.
        guard: Beside a plan or schedule: compute a step that it skips once the changes that the entry's gate predicts
            since the last computed step add up to this; its polynomial (or that of ``coefficients``) must be given.
            It can only add computed steps, and costs the gate's measurement.
        coefficients: A polynomial of your own instead of an entry's, highest power first, with its ``domain`` and
            ``sign_rule`` (``clamp``, ``signed``, ``abs``) and the ``signal`` that it was fitted on
            (``modulated_input``, ``time_embedding``).
        start: First steps that always compute, as a count or a fraction of the schedule (default: entry's, else 1).
        end: Last steps, likewise (default: entry's, else 1; 0 for a bare denoiser of unknown ``num_steps``).
        max_skips: Most consecutive skips; ``None`` lifts the entry's cap.
        num_steps: Length of the schedule for a bare denoiser, which has no scheduler to ask.
        forecast: What a skipped step makes of computed ones: ``reuse`` the last, or extrapolate ``linear`` or
            ``quadratic`` in the noise level (one or two more residuals are kept); or a :class:`runtime.Forecast`.
            Default: the plan's own, for a gate its entry's, else ``reuse``.
        forecast_of: ``residual`` of the block stack, or the denoiser's ``output``, which is far smaller but no longer
            follows the latents of the skipped step. Default: with the default forecast the plan's or the entry's,
            else ``residual``.
        branches: ``together``: the first CFG branch of a step decides for all, which costs one measurement and lets
            their errors cancel in the guidance (default); ``apart``: each decides by its own polynomial (default with
            ``compat``).
        offload: Keep residuals in the host's memory between steps, which frees the device and costs two copies and a
            wait per step.
        compat: Decide as the published implementations do: first and last step computed, no domain, no cap.
        strict: Refuse an entry that was measured with other settings (scheduler, shift, dtype, steps, ...) instead of
            listing the differences in the handle's ``mismatches``.
        blocks: Names the block stack of a model of your own: paths of its lists, or modules.

    Returns:
        The handle; use it as a context manager, or call its ``remove()``.

    Raises:
        InvalidSetting: Settings that exclude each other or cannot be used.
        ApplyError: The cache cannot be installed here; the model is as it was.
        coeffs.errors.CoeffsError: No entry fits.
    """
    modules = denoisers(target)
    for module in modules.values():
        other = enabled_cache(module)
        if other is not None:
            raise ApplyError(
                f"{other} is enabled on {type(module).__name__}; call disable_cache() on it first"
            )
    _check_choice(threshold=threshold, speedup=speedup, schedule=schedule)
    if num_steps is not None and not isinstance(target, nn.Module):
        raise InvalidSetting(
            "num_steps= is for a bare denoiser; a pipeline's scheduler tells it, leave it out"
        )
    if compat and (start is not None or end is not None or max_skips not in (_FROM_ENTRY, None)):
        raise InvalidSetting(
            "start=, end= and max_skips= have no meaning beside compat=True, which fixes them"
        )
    if guard is not None:
        _check_guarded(threshold, schedule, entry, coefficients)
    plan, source = (schedule if isinstance(schedule, coeffs.Plan) else None), None
    if schedule is None or guard is not None:
        source = Source.of(entry, coefficients, domain, sign_rule, signal, target, modules, strict)
    if speedup is not None:
        of_gate = (start, end, forecast, forecast_of, branches, compat or None)
        gate_only = max_skips is not _FROM_ENTRY or any(setting is not None for setting in of_gate)
        found = (threshold_for if gate_only else best_for)(source.entry, speedup)
        plan, threshold = (found, None) if isinstance(found, coeffs.Plan) else (None, found)
        if guard is not None and plan is None:
            raise InvalidSetting(
                f"guard= watches a plan, but for speedup {speedup} the gate is taken, which follows the signal "
                "anyway: leave guard= out, or give one of the entry's plans as schedule="
            )
    if plan is not None:
        schedule = plan.schedule
        if forecast is None:
            forecast = Forecast(plan.forecast or "reuse", plan.weights_by_step)
            forecast_of = forecast_of or plan.forecast_of
    label, mismatches = (source.label, source.mismatches) if source else (None, ())
    if schedule is None:
        config = GateConfig(
            threshold=threshold,
            start=_first(start, source.field("start"), 1),
            end=_first(
                end,
                source.field("end"),
                0 if isinstance(target, nn.Module) and num_steps is None else 1,
            ),
            max_skips=source.field("max_skips") if max_skips is _FROM_ENTRY else max_skips,
            compat=compat,
        )
        if config.needs_num_steps and isinstance(target, nn.Module) and num_steps is None:
            raise InvalidSetting(
                "a bare denoiser has no scheduler to ask for the number of steps: give num_steps=..., or start as a "
                "count and end=0"
            )
        if forecast is None and source.entry is not None:
            forecast = source.entry.forecast
            forecast_of = forecast_of or source.entry.forecast_of

        def policy(expert: str, branch: str) -> Policy:
            return Gate(source.polynomial(expert, branch), config)
    else:
        own = {
            "coefficients": coefficients,
            "domain": domain,
            "sign_rule": sign_rule,
            "signal": signal,
        }
        cap = None if max_skips is _FROM_ENTRY else "lifted" if max_skips is None else max_skips
        # A plan states its noise levels, and a guard has an entry: they can be strict.
        lax = strict or None if plan is None and guard is None else None
        own = own if guard is None else {}
        _refuse_with_schedule(
            **own, start=start, end=end, max_skips=cap, compat=compat or None, strict=lax
        )
        if source is None and entry is not None:
            label = loaded(entry).label

        def policy(expert: str, branch: str) -> Policy:
            if guard is None:
                return FixedSchedule(schedule)
            return GuardedSchedule(schedule, source.polynomial(expert, branch), guard)

    for expert in modules:
        policy(
            expert, ""
        )  # a missing expert or an unusable polynomial shows before anything is hooked
    by_signal = schedule is None or guard is not None
    signal = source.signal if by_signal else "modulated_input"
    stated_steps = (
        source.entry.protocol.num_steps if by_signal and source.entry is not None else None
    )

    forecast = forecast if isinstance(forecast, Forecast) else Forecast(forecast or "reuse")
    if schedule is not None and forecast.kind == "fitted":
        forecast = _fitted_for(schedule, forecast)
    forecast_of = forecast_of or "residual"
    if forecast_of not in ("residual", "output"):
        raise InvalidSetting(f"forecast_of {forecast_of!r}: expected residual or output")
    policy_name = "gate" if schedule is None else "plan" if plan is not None else "schedule"
    settings = {"policy": policy_name, "entry": label, "signal": signal, "threshold": threshold}
    settings |= {"schedule": schedule, "guard": guard, "compat": compat}
    handle = TeaCache(target, settings | {"forecast": forecast.kind, "forecast_of": forecast_of})

    handle.mismatches += mismatches
    branches = branches or ("apart" if compat else "together")
    if branches not in ("together", "apart"):
        raise InvalidSetting(f"branches {branches!r}: expected together or apart")
    handle.settings["branches"] = branches

    clock = None if isinstance(target, nn.Module) else SchedulerClock(target)

    def differs(text: str, made: str, advice: str) -> None:
        if strict:
            raise InvalidSetting(f"{label or 'the plan'} was not {made}: {text}; {advice}")
        if text not in handle.mismatches:
            handle.mismatches.append(text)

    def check_steps(found: int | None) -> None:
        if plan is not None and plan.sigmas is not None and clock is not None:
            check_levels(plan.sigmas)
        if stated_steps is not None and found not in (None, stated_steps):
            text = f"num_steps: {stated_steps} in the entry, {found} here"
            differs(text, "measured like this", f"calibrate at {found} steps")

    def check_levels(stated: Sequence[float]) -> None:
        levels = [clock.sigma(step) for step in range(len(stated))]
        largest = max(map(abs, stated))
        off = [
            a is not None and abs(a - b) > LEVEL_TOLERANCE * largest
            for a, b in zip(levels, stated, strict=True)
        ]
        if any(off):
            step = off.index(True)
            text = f"sigma of step {step}: {stated[step]:.4g} in the plan, {levels[step]:.4g} here"
            differs(text, "planned for this schedule", "plan at these settings")

    if (
        schedule is None and source.field("forecast") is not None
    ):  # its threshold is for this forecast's error
        stated = f"{source.entry.forecast} of {source.entry.forecast_of or 'residual'}"
        if stated != f"{forecast.kind} of {forecast_of}":
            text = f"forecast: {stated} in the entry, {forecast.kind} of {forecast_of} here"
            differs(text, "fitted for this forecast", "leave forecast= and forecast_of= out")

    def new_handler(expert: str) -> CacheHandler:
        return CacheHandler(
            expert,
            lambda branch: policy(expert, branch),
            signal,
            handle.stats,
            forecast,
            of_output=forecast_of == "output",
            together=branches == "together",
            offload=offload,
            on_generation=check_steps,
        )

    _install(handle, target, modules, new_handler, blocks, clock, num_steps)
    return handle


def _install(
    handle: TeaCache,
    target: Any,
    modules: dict[str, nn.Module],
    new_handler: Callable[[str], CacheHandler],
    blocks: Sequence[str | nn.Module] | None,
    clock: SchedulerClock | None,
    num_steps: int | None,
) -> None:
    try:
        for expert, module in modules.items():
            handler = new_handler(expert)
            hooks = StackHooks(module, handler, blocks, on_reset=handler.reset)
            handler.bind(hooks, Locator(module, hooks.receiver, clock, num_steps))
            hooks.install()
            handle._parts.append((hooks, handler))
    except BaseException:
        handle.remove()
        raise
    for _, handler in handle._parts:
        handler.siblings = [other for _, other in handle._parts if other is not handler]
    if clock is not None:
        _free_after_generation(target, handle)


def _free_after_generation(pipeline: Any, handle: TeaCache) -> None:
    """Pipelines end every generation with ``maybe_free_model_hooks``: free what was kept then."""

    def free() -> Any:
        handle.reset()
        return type(pipeline).maybe_free_model_hooks(pipeline)

    if hasattr(pipeline, "maybe_free_model_hooks"):
        pipeline.__dict__["maybe_free_model_hooks"] = handle._free = free


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _check_choice(**choices: Any) -> None:
    given = [name for name, value in choices.items() if value is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise InvalidSetting(
            f"{found} given: expected exactly one of {', '.join(f'{name}=' for name in choices)}"
        )


def _check_guarded(threshold: float | None, schedule: Any, entry: Any, coefficients: Any) -> None:
    if threshold is not None:
        raise InvalidSetting(
            "guard= watches a plan and threshold= is the gate's own: give schedule= or speedup="
        )
    if schedule is not None and entry is None and coefficients is None:
        raise InvalidSetting(
            "guard= needs a polynomial to judge changes by: give an entry beside schedule=, or coefficients=[...]"
        )


def _fitted_for(schedule: str, forecast: Forecast) -> Forecast:
    """The fitted forecast with the schedule that its weights were made for."""
    if forecast.schedule not in (None, schedule):
        raise InvalidSetting(
            f"forecast fitted for {forecast.schedule}, the schedule is {schedule}: give the one that it was fitted for"
        )
    return replace(forecast, schedule=schedule)


def _refuse_with_schedule(**settings: Any) -> None:
    for name, value in settings.items():
        if value is not None:
            raise InvalidSetting(
                f"{name}= has no meaning beside schedule=, which fixes every step; leave it out"
            )
