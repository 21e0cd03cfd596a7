"""``apply_tea_cache``: settings resolved and checked first, hooks installed last, all or none."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

import coeffs
from coeffs.errors import EntryMismatch
from coeffs.match import compare
from coeffs.polynomial import Polynomial
from runtime.cache import CacheHandler
from runtime.clock import Locator, SchedulerClock
from runtime.compat import enabled_cache, unwrapped
from runtime.errors import ApplyError, InvalidSetting, UnsupportedModel
from runtime.facts import class_name, facts_of
from runtime.forecast import Forecast
from runtime.gate import FixedSchedule, Gate, GateConfig, Policy
from runtime.hooks import StackHooks
from runtime.stats import Stats

SIGNALS = ("modulated_input", "time_embedding")
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
        if self._free is not None and self._target.__dict__.get("maybe_free_model_hooks") is self._free:
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
        coefficients: A polynomial of your own instead of an entry's, highest power first, with its ``domain`` and
            ``sign_rule`` (``clamp``, ``signed``, ``abs``) and the ``signal`` that it was fitted on
            (``modulated_input``, ``time_embedding``).
        start: First steps that always compute, as a count or a fraction of the schedule (default: entry's, else 1).
        end: Last steps, likewise (default: entry's, else 1; 0 for a bare denoiser of unknown ``num_steps``).
        max_skips: Most consecutive skips; ``None`` lifts the entry's cap.
        num_steps: Length of the schedule for a bare denoiser, which has no scheduler to ask.
        forecast: What a skipped step makes of computed ones: ``reuse`` the last, or extrapolate ``linear`` or
            ``quadratic`` in the noise level (one or two more residuals are kept); or a :class:`runtime.Forecast`.
            Default: the plan's own, else ``reuse``.
        forecast_of: ``residual`` of the block stack (default), or the denoiser's ``output``, which is far smaller but
            no longer follows the latents of the skipped step.
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
            raise ApplyError(f"{other} is enabled on {type(module).__name__}; call disable_cache() on it first")
    _check_choice(threshold=threshold, speedup=speedup, schedule=schedule)
    if num_steps is not None and not isinstance(target, nn.Module):
        raise InvalidSetting("num_steps= is for a bare denoiser; a pipeline's scheduler tells it, leave it out")
    if compat and (start is not None or end is not None or max_skips not in (_FROM_ENTRY, None)):
        raise InvalidSetting("start=, end= and max_skips= have no meaning beside compat=True, which fixes them")
    plan, source = (schedule if isinstance(schedule, coeffs.Plan) else None), None
    if schedule is None:
        source = _Source.of(entry, coefficients, domain, sign_rule, signal, target, modules, strict)
        if speedup is not None:
            of_gate = (start, end, forecast, forecast_of, branches, compat or None)
            gate_only = max_skips is not _FROM_ENTRY or any(setting is not None for setting in of_gate)
            found = (threshold_for if gate_only else best_for)(source.entry, speedup)
            plan, threshold = (found, None) if isinstance(found, coeffs.Plan) else (None, found)
    if plan is not None:
        schedule = plan.schedule
        if forecast is None:
            forecast = Forecast(plan.forecast or "reuse", plan.weights_by_step)
            forecast_of = forecast_of or plan.forecast_of
    if schedule is None:
        config = GateConfig(
            threshold=threshold,
            start=_first(start, source.field("start"), 1),
            end=_first(end, source.field("end"), 0 if isinstance(target, nn.Module) and num_steps is None else 1),
            max_skips=source.field("max_skips") if max_skips is _FROM_ENTRY else max_skips,
            compat=compat,
        )
        if config.needs_num_steps and isinstance(target, nn.Module) and num_steps is None:
            raise InvalidSetting(
                "a bare denoiser has no scheduler to ask for the number of steps: give num_steps=..., or start as a "
                "count and end=0"
            )
        label, signal, mismatches = source.label, source.signal, source.mismatches
        stated_steps = source.entry.protocol.num_steps if source.entry is not None else None

        def policy(expert: str, branch: str) -> Policy:
            return Gate(source.polynomial(expert, branch), config)

        for expert in modules:
            policy(expert, "")  # a missing expert or an unusable polynomial shows before anything is hooked
    else:
        cap = None if max_skips is _FROM_ENTRY else "lifted" if max_skips is None else max_skips
        _refuse_with_schedule(
            coefficients=coefficients, domain=domain, sign_rule=sign_rule, signal=signal,
            start=start, end=end, max_skips=cap, compat=compat or None,
            strict=None if plan is not None else strict or None,  # a plan states its noise levels
        )  # fmt: skip
        FixedSchedule(schedule)
        label, mismatches = (source.label, source.mismatches) if source else (None, ())
        if source is None and entry is not None:
            label = _loaded(entry).label
        signal, stated_steps = "modulated_input", None

        def policy(expert: str, branch: str) -> Policy:
            return FixedSchedule(schedule)

    forecast = forecast if isinstance(forecast, Forecast) else Forecast(forecast or "reuse")
    forecast_of = forecast_of or "residual"
    if forecast_of not in ("residual", "output"):
        raise InvalidSetting(f"forecast_of {forecast_of!r}: expected residual or output")
    policy_name = "gate" if schedule is None else "plan" if plan is not None else "schedule"
    settings = {"policy": policy_name, "entry": label, "signal": signal, "threshold": threshold}
    settings |= {"schedule": schedule, "compat": compat}
    handle = TeaCache(target, settings | {"forecast": forecast.kind, "forecast_of": forecast_of})

    handle.mismatches += mismatches
    branches = branches or ("apart" if compat else "together")
    if branches not in ("together", "apart"):
        raise InvalidSetting(f"branches {branches!r}: expected together or apart")
    handle.settings["branches"] = branches

    clock = None if isinstance(target, nn.Module) else SchedulerClock(target)

    def check_steps(found: int | None) -> None:
        if plan is not None and plan.sigmas is not None and clock is not None:
            check_levels(plan.sigmas)
        if stated_steps is None or found in (None, stated_steps):
            return
        text = f"num_steps: {stated_steps} in the entry, {found} here"
        if strict:
            raise InvalidSetting(f"{label} was not measured like this: {text}; calibrate at {found} steps")
        if text not in handle.mismatches:
            handle.mismatches.append(text)

    def check_levels(stated: Sequence[float]) -> None:
        levels = [clock.sigma(step) for step in range(len(stated))]
        largest = max(map(abs, stated))
        off = [a is not None and abs(a - b) > LEVEL_TOLERANCE * largest for a, b in zip(levels, stated, strict=True)]
        if not any(off):
            return
        step = off.index(True)
        text = f"sigma of step {step}: {stated[step]:.4g} in the plan, {levels[step]:.4g} here"
        if strict:
            raise InvalidSetting(f"{label} was not planned for this schedule: {text}; plan at these settings")
        if text not in handle.mismatches:
            handle.mismatches.append(text)

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

    _install(handle, target, modules, new_handler, blocks, num_steps)
    return handle


def threshold_for(entry: "coeffs.Entry | None", speedup: float) -> float:
    """The lowest verified threshold of ``entry`` that reaches ``speedup``, between table rows by interpolation.

    Raises:
        InvalidSetting: The entry has no measured speed-ups, or none as high.
    """
    if entry is None:
        raise InvalidSetting("speedup= needs a registry entry with verified thresholds; give threshold= instead")
    rows = sorted(
        (row.speedup, row.threshold)
        for row in entry.thresholds or ()
        if row.kind == "verified" and row.speedup is not None
    )
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


def best_for(entry: "coeffs.Entry", speedup: float) -> "float | coeffs.Plan":
    """The gate's threshold or the plan of ``entry`` that verified best among those that reach ``speedup``.

    Both are judged by what was measured at this speed-up or a higher one.

    Raises:
        InvalidSetting: Neither was verified at this speed-up.
    """

    def fidelity(figures: Any) -> float:
        return next((figures[name] for name in ("psnr_db", "snr_db") if figures.get(name) is not None), float("-inf"))

    plans = (entry and entry.plans) or ()
    plans = [plan for plan in plans if ((plan.figures or {}).get("speedup") or 0) >= speedup >= 1]
    plan = max(plans, key=lambda plan: fidelity(plan.figures), default=None)
    try:
        threshold = threshold_for(entry, speedup)
    except InvalidSetting:
        if plan is None:
            raise
        return plan
    rows = [row for row in entry.thresholds if row.kind == "verified" and (row.speedup or 0) >= speedup]
    gate = min(rows, key=lambda row: row.speedup).psnr_db
    if plan is None or (gate is not None and gate >= fidelity(plan.figures)):
        return threshold
    return plan


@dataclass(frozen=True)
class _Source:
    """Where the polynomials come from: an entry, or coefficients of the caller's own."""

    entry: "coeffs.Entry | None"
    own: Polynomial | None
    signal: str
    mismatches: tuple[str, ...] = ()

    @classmethod
    def of(cls, entry, coefficients, domain, sign_rule, signal, target, modules, strict) -> "_Source":
        if coefficients is not None:
            if entry is not None:
                raise InvalidSetting("entry and coefficients given: expected one of them")
            own = Polynomial(tuple(coefficients), domain, sign_rule or "clamp")
            return cls(None, own, _checked_signal(signal or "modulated_input"))
        _refuse_with_entry(domain=domain, sign_rule=sign_rule, signal=signal)
        found = _loaded(entry) if entry is not None else _entry_for(target, modules, strict)
        classes = {class_name(module) for module in modules.values()}
        if entry is not None and found.transformer_class and found.transformer_class.split()[0] not in classes:
            raise InvalidSetting(
                f"{found.label} is for {found.transformer_class}, this model is {', '.join(sorted(classes))}: "
                "use an entry for this class, or pass its numbers as coefficients=[...] if you mean to"
            )
        differences = tuple(map(str, compare(found, facts_of(target, modules))[0]))
        if strict and differences:
            raise EntryMismatch(
                f"{found.label} was not measured like this: {'; '.join(differences)}; leave strict out"
            )
        return cls(found, None, _checked_signal(found.signal), differences)

    @property
    def label(self) -> str | None:
        return None if self.entry is None else self.entry.label

    def field(self, name: str) -> Any:
        return getattr(self.entry, name, None)

    def polynomial(self, expert: str, branch: str) -> Polynomial:
        """The polynomial of a branch of an expert: its own where the entry has one, else the recommended one."""
        return self.own or self.entry.fit(expert, branch).polynomial(self.entry.sign_rule)


def _entry_for(target: Any, modules: dict[str, nn.Module], strict: bool) -> "coeffs.Entry":
    return coeffs.find(facts_of(target, modules), strict=strict).entry


def _loaded(entry: "coeffs.Entry | str") -> "coeffs.Entry":
    return entry if isinstance(entry, coeffs.Entry) else coeffs.load(entry)


def _install(
    handle: TeaCache,
    target: Any,
    modules: dict[str, nn.Module],
    new_handler: Callable[[str], CacheHandler],
    blocks: Sequence[str | nn.Module] | None,
    num_steps: int | None,
) -> None:
    clock = None if isinstance(target, nn.Module) else SchedulerClock(target)
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
        raise InvalidSetting(f"{found} given: expected exactly one of {', '.join(f'{name}=' for name in choices)}")


def _refuse_with_schedule(**settings: Any) -> None:
    for name, value in settings.items():
        if value is not None:
            raise InvalidSetting(f"{name}= has no meaning beside schedule=, which fixes every step; leave it out")


def _refuse_with_entry(**settings: Any) -> None:
    for name, value in settings.items():
        if value is not None:
            raise InvalidSetting(f"{name}= belongs to coefficients=; an entry brings its own")


def _checked_signal(signal: str) -> str:
    if signal not in SIGNALS:
        raise InvalidSetting(f"signal {signal!r}: the runtime can watch {' or '.join(SIGNALS)}; use another entry")
    return signal
