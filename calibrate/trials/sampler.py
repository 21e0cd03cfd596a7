"""Running a pipeline under a setting (gate, plan, fewer steps, one of diffusers' caches) and keeping what it made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from calibrate.errors import CalibrateError
from calibrate.model.prompts import Prompt
from calibrate.trials.baselines import Refused, Setting
from calibrate.trials.rivals import second_order
from coeffs import Entry
from runtime.apply import apply_tea_cache, denoisers
from runtime.compat.diffusers_private import hook_registry
from runtime.decide.forecast import Forecast
from runtime.watch.blocks import find_blocks

STEPS = "num_inference_steps"
DIFFUSERS_CACHES = ("FirstBlockCache", "MagCache", "SeaCache")


class NothingSampled(CalibrateError):
    """A pipeline whose result holds no image, video or sound that could be compared."""


@dataclass(frozen=True)
class Sample:
    """One generation.

    Attributes:
        media: Image (height, width, channels) or video (frames first) in [0, 1], or a waveform (channels, samples);
            several where the pipeline makes picture and sound.
        latents: What was handed to the decoder, flat; ``None`` where nothing was decoded.
        seconds: Wall time of the whole pipeline call.
        patterns: ``"expert/branch" -> "CCSC..."`` where the runtime's hooks decided.
        computed_steps: Mean over branches, summed over experts.
    """

    media: list[np.ndarray]
    latents: np.ndarray | None
    seconds: float
    patterns: dict[str, str] = field(default_factory=dict)
    computed_steps: float = float("nan")


class Sampler:
    """Generates samples of one pipeline with the same call arguments and seeds.

    Args:
        pipeline: A diffusers pipeline.
        arguments: Of every call, besides the prompt's own (``run.yaml``'s ``call``).
        accepts: Whether the pipeline takes an argument.
    """

    def __init__(
        self, pipeline: Any, arguments: Mapping[str, Any], accepts: Callable[[str], bool]
    ) -> None:
        self.pipeline = pipeline
        self.arguments = dict(arguments)
        if accepts("output_type"):
            self.arguments["output_type"] = "np"

    def __call__(
        self, prompt: Prompt, images: Sequence[Any] = (), *, num_steps: int | None = None
    ) -> Sample:
        """One generation of ``prompt`` with its seed, under whatever is applied to the pipeline."""
        arguments = {**self.arguments, "prompt": prompt.prompt}
        if num_steps is not None:
            if {"sigmas", "timesteps"} & set(arguments):
                raise Refused(
                    "the schedule is given step by step (sigmas or timesteps) and cannot be shortened"
                )
            arguments[STEPS] = num_steps
        if prompt.negative_prompt is not None:
            arguments["negative_prompt"] = prompt.negative_prompt
        if images:
            arguments["image"] = images[0] if len(images) == 1 else list(images)
        generator = torch.Generator("cpu").manual_seed(prompt.seed)
        with torch.inference_mode(), _captured_latents(self.pipeline) as latents:
            _synchronize()
            begun = time.perf_counter()
            output = self.pipeline(**arguments, generator=generator)
            _synchronize()
            seconds = time.perf_counter() - begun
        return Sample(
            _media(output),
            np.concatenate([part.ravel() for part in latents]) if latents else None,
            seconds,
        )

    def run(
        self,
        setting: Setting,
        prompt: Prompt,
        images: Sequence[Any] = (),
        *,
        entries: Mapping[str, Entry],
    ) -> Sample:
        """One generation under ``setting``; the pipeline is as before afterwards."""
        with _applied(self.pipeline, setting, entries) as patterns:
            shorter = setting.budget if setting.kind == "fewer_steps" else None
            try:
                sample = self(prompt, images, num_steps=shorter)
            except Exception as error:
                if setting.kind not in DIFFUSERS_CACHES:
                    raise
                raise Refused(
                    f"{setting.policy} fails on this model: {' '.join(str(error).split())[:200]}"
                ) from error
            found = patterns()
        computed = float(setting.budget) if setting.kind == "fewer_steps" else computed_steps(found)
        return replace(sample, patterns=found, computed_steps=computed)


def computed_steps(patterns: Mapping[str, str]) -> float:
    """Computed steps of a generation: mean over the branches of an expert, summed over experts."""
    counts: dict[str, list[int]] = {}
    for name, pattern in patterns.items():
        counts.setdefault(name.partition("/")[0], []).append(pattern.count("C"))
    return float(sum(np.mean(values) for values in counts.values()))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def _captured_latents(pipeline: Any) -> Iterator[list[np.ndarray]]:
    """The first argument of every ``vae.decode``: the final latents of any pipeline that decodes."""
    decoder, kept = getattr(pipeline, "vae", None), []
    original = getattr(decoder, "decode", None)
    if original is None:
        yield kept
        return

    def decode(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kept.append(latents.detach().float().cpu().numpy())
        return original(latents, *args, **kwargs)

    decoder.decode = decode
    try:
        yield kept
    finally:
        del decoder.decode


def _media(output: Any) -> list[np.ndarray]:
    """The first sample of everything a pipeline returned that can be looked at or listened to."""
    found = []
    for name in ("images", "frames", "videos", "audios", "audio"):
        value = getattr(output, name, None)
        if value is None or len(value) == 0:
            continue
        first = value[0]
        array = (
            first.detach().float().cpu().numpy()
            if isinstance(first, torch.Tensor)
            else np.asarray(first)
        )
        if array.dtype == np.uint8:
            array = array.astype(np.float32) / 255
        if array.ndim == 1:
            array = array[None]
        found.append(array.astype(np.float32))
    if not found:
        raise NothingSampled(
            f"{type(output).__name__} holds no images, frames or audios; verify needs one of them"
        )
    return found


@contextmanager
def _applied(
    pipeline: Any, setting: Setting, entries: Mapping[str, Entry]
) -> Iterator[Callable[[], dict[str, str]]]:
    """Install a setting; what is yielded tells the patterns of the generation that followed."""
    options = dict(setting.parameters)
    if setting.kind == "fewer_steps":
        with second_order(pipeline) if options.get("solver_order") == 2 else nullcontext():
            yield dict
    elif setting.kind in DIFFUSERS_CACHES:
        with _diffusers_cache(pipeline, setting.kind, options) as patterns:
            yield patterns
    else:
        entry = entries[options.pop("entry")] if setting.kind == "gate" else None
        if options.get("forecast") == "fitted":  # its weights are plain data: text keys, lists
            rows = {int(step): tuple(row) for step, row in options.pop("weights").items()}
            options["forecast"] = Forecast("fitted", rows)
        with apply_tea_cache(pipeline, entry, **options) as cache:
            yield lambda: {
                f"{e}/{b}": found.pattern for (e, b), found in cache.stats.branches.items()
            }


@contextmanager
def _diffusers_cache(
    pipeline: Any, name: str, options: Mapping[str, Any]
) -> Iterator[Callable[[], dict[str, str]]]:
    """One of diffusers' own caches on every denoiser. Raises :class:`Refused` where it cannot be enabled."""
    import diffusers

    config = getattr(diffusers, f"{name}Config", None)
    if config is None:
        raise Refused(f"diffusers {diffusers.__version__} has no {name}")
    modules = denoisers(pipeline)
    before = {part: set(registry.hooks) for part, registry in _registries(modules)}
    counters = {}
    try:
        for expert, module in modules.items():
            if not hasattr(module, "enable_cache"):
                raise Refused(f"{type(module).__name__} has no enable_cache")
            try:
                module.enable_cache(config(**options))
            except (
                Exception
            ) as error:  # whatever a cache raises on a model it was not written for is a refusal
                raise Refused(
                    f"{name} on {type(module).__name__}: {' '.join(str(error).split())[:200]}"
                ) from None
            counters[expert] = _StackCounter(module)
        yield lambda: {
            f"{expert}/branch {index}": pattern
            for expert, counter in counters.items()
            for index, pattern in enumerate(counter.patterns())
        }
    finally:
        for counter in counters.values():
            counter.remove()
        for module in modules.values():
            if getattr(module, "is_cache_enabled", False):
                module.disable_cache()
        # A refusal half-way leaves hooks behind, which disable_cache does not know of.
        for part, registry in _registries(modules):
            for hook in set(registry.hooks) - before.get(part, set()):
                registry.remove_hook(hook, recurse=False)


def _registries(modules: Mapping[str, torch.nn.Module]) -> Iterator[tuple[torch.nn.Module, Any]]:
    for module in modules.values():
        for part in module.modules():
            registry = hook_registry(part)
            if registry is not None:
                yield part, registry


class _StackCounter:
    """One letter per denoiser call: C where a module inside the last block ran, S where it did not.

    Calls of one timestep belong to different branches, in turn.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._letters: dict[float, str] = {}
        self._ran = False
        inside = [
            part for part in find_blocks(module)[-1][1].modules() if not list(part.children())
        ]
        self._handles = [part.register_forward_pre_hook(self._inside) for part in inside]
        self._handles.append(module.register_forward_hook(self._after, with_kwargs=True))

    def _inside(self, module: torch.nn.Module, args: tuple) -> None:
        self._ran = True

    def _after(self, module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        time_of = kwargs.get("timestep")
        key = (
            float(time_of.flatten()[0])
            if isinstance(time_of, torch.Tensor)
            else float(len(self._letters))
        )
        self._letters[key] = self._letters.get(key, "") + ("C" if self._ran else "S")
        self._ran = False

    def patterns(self) -> list[str]:
        """One pattern per branch."""
        return ["".join(letters) for letters in zip(*self._letters.values(), strict=False)]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
