"""``apply_tea_cache``: settings resolved and checked first, hooks installed last, all or none."""

import logging
import re
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache, partial
from typing import Any, Self

from torch.nn import Module

import coeffs
from coeffs.entry.certificates import EXACT
from runtime.anchors import Anchors, Guided
from runtime.asked import FROM_ENTRY, Asked, Model, check
from runtime.cache import CacheHandler
from runtime.compat.diffusers_private import enabled_cache, unwrapped
from runtime.decide.forecast import Forecast
from runtime.errors import ApplyError, UnsupportedModel
from runtime.facts import class_name, facts_of
from runtime.settings import Settings, for_steps, resolve
from runtime.stats import Stats
from runtime.watch.blocks import Blocks
from runtime.watch.hooks import Watch
from runtime.watch.ranks import refuse_inner_sharding
from runtime.watch.scheduler import OwnLoop, SchedulerClock, hooked_steps

_DENOISER = re.compile(r"^(transformer|denoiser|dit)(_\d+)?$")
_logger = logging.getLogger(__name__)


def denoisers(target: Any) -> dict[str, Module]:
    """The denoisers of a pipeline or loop by name (two for two-expert models); a bare module is ``transformer``.

    Raises:
        UnsupportedModel: The pipeline has no transformer.
    """
    if isinstance(target, Module):
        target = OwnLoop(target)
    modules = target.modules if isinstance(target, OwnLoop) else _components(target)
    return {name: unwrapped(module) for name, module in modules.items()}


def _components(pipeline: Any) -> dict[str, Module]:
    """The denoisers among a pipeline's components."""
    name, components = type(pipeline).__name__, getattr(pipeline, "components", None)
    if not isinstance(components, dict):
        raise UnsupportedModel(
            f"{name}: expected a diffusers pipeline, or the denoiser itself as a torch module"
        )
    modules = {
        component: module
        for component, module in components.items()
        if _DENOISER.match(component) and isinstance(module, Module)
    }
    if not modules:
        raise UnsupportedModel(
            f"{name}: none of its components ({', '.join(components)}) is a diffusion transformer; "
            "pass the denoiser itself"
        )
    return modules


class Handle:
    """Something that is installed on a pipeline's denoisers; a context manager."""

    def __init__(self) -> None:
        self.installed = ExitStack()

    def remove(self) -> None:
        """Take it off; the model gives the same results as before. Does nothing when it is off already."""
        self.installed.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


class TeaCache(Handle):
    """An applied cache: statistics, reset, removal. Made by :func:`apply_tea_cache`; a context manager.

    Attributes:
        stats: What was computed and skipped (:class:`runtime.stats.Stats`).
        settings: What is in force: the entry's label, signal, threshold or schedule.
        mismatches: In what this pipeline differs from what the entry was measured on, in words; the number of steps
            joins when a generation shows it. Each is also logged once, as a warning.
    """

    _watch: Watch | None = None  # where nothing is applied

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.stats = Stats()
        self.settings = settings
        self.mismatches: list[str] = []

    def reset(self) -> None:
        """Forget the generation under way; the next denoiser call begins a new one. Statistics stay."""
        if self._watch is not None:
            self._watch.reset()

    def __enter__(self) -> Self:
        self.reset()
        return self

    def differs(self, difference: str) -> None:
        """List and log what differs from what the entry was measured on, unless it is listed already."""
        if difference not in self.mismatches:
            self.mismatches.append(difference)
            whose = self.settings["entry"] or self.settings["policy"]
            _logger.warning(
                "%s: %s; results may differ from what was measured", whose, difference
            )


def apply_tea_cache(
    target: Any,
    entry: "coeffs.Entry | str | None" = None,
    *,
    threshold: float | None = None,
    speedup: float | None = None,
    schedule: "str | coeffs.Plan | None" = None,
    quality: str | None = None,
    coefficients: Sequence[float] | None = None,
    domain: tuple[float, float] | None = None,
    sign_rule: str | None = None,
    signal: str | None = None,
    start: int | float | None = None,
    end: int | float | None = None,
    max_skips: int | None = FROM_ENTRY,
    num_steps: int | None = None,
    forecast: str | Forecast | None = None,
    forecast_of: str | None = None,
    branches: str | None = None,
    offload: bool = False,
    compat: bool = False,
    strict: bool | None = None,
    blocks: Blocks | None = None,
) -> TeaCache:
    """Apply TeaCache to a diffusers pipeline or to a bare denoiser.

    Exactly one of ``threshold``, ``speedup``, ``schedule`` and ``quality`` says how much to skip.

    Args:
        target: A pipeline (all its denoisers are hooked), a :class:`runtime.OwnLoop`, or the denoiser module.
        entry: A registry entry or its name; ``None`` finds the one that fits the model, unless ``coefficients`` or
            a ``schedule`` are given; one that was measured at a generation's number of steps takes over there.
        threshold: Higher is faster and less faithful; 0.05 to 0.3 is usual. Steps are skipped while the accumulated
            predicted change stays below it; 0 computes every step.
        speedup: What verified best at this speed-up: the entry's gate at a threshold, or one of its plans; the
            handle's ``settings["policy"]`` says which. Settings of the gate beside it take the gate.
        schedule: A fixed plan, one letter per denoising step: ``C`` computes, ``S`` skips; or one of an entry's
            ``plans``, which brings its forecast. Other noise levels than it was made for are a mismatch.
        quality: A tier that the entry is certified for, such as ``high``: its fastest cache. Refused where the
            certificate does not cover dtype, steps, scheduler, quantisation or LoRA, unless ``strict=False``;
            ``settings["promise"]`` says what holds. ``exact`` applies nothing, and needs no entry.
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
        forecast_of: ``residual`` of the block stack; or the denoiser's ``output``, which is far smaller but no longer
            follows the latents of the skipped step; or the ``guided`` prediction that a pipeline's scheduler receives,
            one small tensor for all branches, and what the solver sees whatever the guidance does to it.
            Default: with the plan's forecast the plan's, else ``residual``.
        branches: ``together``: the first CFG branch of a step decides for all, which costs one measurement and lets
            their errors cancel in the guidance (default); ``apart``: each decides by its own polynomial (default with
            ``compat``).
        offload: Keep residuals in the host's memory between steps, which frees the device and costs two copies and a
            wait per step.
        compat: Decide as the published implementations do: first and last step computed, no domain, no cap.
        strict: Refuse an entry that was measured with other settings (scheduler, shift, dtype, steps, ...) instead of
            listing the differences in the handle's ``mismatches``. Default: only beside ``quality``.
        blocks: Names the block stack of a model of your own: paths of its lists, or modules.

    Returns:
        The handle; use it as a context manager, or call its ``remove()``.

    Raises:
        InvalidSetting: Settings that exclude each other or cannot be used.
        ApplyError: The cache cannot be installed here; the model is as it was.
        coeffs.errors.CoeffsError: No entry fits.
    """
    asked = Asked(
        entry=entry,
        threshold=threshold,
        speedup=speedup,
        schedule=schedule,
        quality=quality,
        coefficients=coefficients,
        domain=domain,
        sign_rule=sign_rule,
        signal=signal,
        start=start,
        end=end,
        max_skips=max_skips,
        num_steps=num_steps,
        forecast=forecast,
        forecast_of=forecast_of,
        branches=branches,
        offload=offload,
        compat=compat,
        strict=strict,
    )
    return _installed(target, asked, blocks)


def _installed(target: Any, asked: Asked, blocks: Blocks | None) -> TeaCache:
    if isinstance(target, Module):
        target = OwnLoop(target)
    modules = denoisers(target)
    for module in modules.values():
        other = enabled_cache(module)
        if other is not None:
            raise ApplyError(
                f"{other} is enabled on {type(module).__name__}; call disable_cache() on it first"
            )
    pipeline = target
    if isinstance(target, OwnLoop):
        pipeline = target.driver
        blocks = target.blocks if blocks is None else blocks
    model = Model(
        facts=facts_of(target, modules) | {"num_steps": asked.num_steps},
        classes={name: class_name(module) for name, module in modules.items()},
        has_scheduler=pipeline is not None,
    )
    if asked.quality == EXACT:
        check(asked, model)
        return TeaCache({"policy": EXACT, "entry": None, "quality": EXACT})
    settings = resolve(asked, model)
    handle = TeaCache(settings.described())
    clock = SchedulerClock(pipeline, asked.num_steps)
    settings_for = cache(partial(for_steps, settings, model))  # a look-up reads the registry

    def on_generation(num_steps: int | None) -> Settings:
        in_force = settings_for(num_steps)
        handle.settings.update(in_force.described())
        difference = in_force.difference(num_steps, clock.sigma)
        if difference is not None:
            handle.differs(difference)
        return in_force

    guided = None
    if settings.forecast_of == "guided":
        anchors = Anchors(settings.forecast, clock.level, asked.offload)
        guided = Guided(anchors, across_experts=settings.forecast.kind == "fitted")

    def new_handler(expert: str) -> CacheHandler:
        return CacheHandler(expert, handle.stats, clock.level, on_generation, guided)

    handle._watch = watch = Watch(modules, new_handler, clock, blocks)
    for stack in watch.stacks:
        refuse_inner_sharding(stack.root, stack.blocks)
    with ExitStack() as installed:
        if guided is not None:
            installed.enter_context(hooked_steps(pipeline, guided.step))
        installed.enter_context(watch.installed())
        handle.installed = installed.pop_all()
    for mismatch in settings.mismatches:
        handle.differs(mismatch)
    if settings.advice is not None:
        _logger.warning("%s: %s", settings.label, settings.advice)
    if hasattr(pipeline, "maybe_free_model_hooks"):
        _free_after_generation(pipeline, handle)
    return handle


def _free_after_generation(pipeline: Any, handle: TeaCache) -> None:
    """Pipelines end every generation with ``maybe_free_model_hooks``: free what was kept then."""

    def free() -> Any:
        handle.reset()
        return type(pipeline).maybe_free_model_hooks(pipeline)

    attributes = vars(pipeline)
    attributes["maybe_free_model_hooks"] = free
    handle.installed.callback(attributes.pop, "maybe_free_model_hooks", None)
