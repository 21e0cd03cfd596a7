"""Running a session under a setting (gate, plan, fewer steps, another cache) and keeping what it made."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from calibrate.errors import CalibrateError
from calibrate.model.prompts import Prompt
from calibrate.model.session import STEPS, Session
from calibrate.runs.files import write_arrays, write_json
from calibrate.trials.measures import Made
from calibrate.trials.rivals import (
    DIFFUSERS_CACHES,
    diffusers_cache,
    refusing,
    second_order,
    taken_off,
)
from calibrate.trials.setting import Patterns, PatternsOf, Refused, Setting, computed_steps
from calibrate.trials.through import KIND as THROUGH
from calibrate.trials.through import run_through
from runtime.apply import apply_tea_cache

LONGEST_SERIES = 20_000  # values; half a second of sound


class NothingSampled(CalibrateError):
    """A pipeline whose result holds no image, video or sound that could be compared."""


@dataclass(frozen=True)
class Sample(Made):
    """One generation.

    Attributes:
        seconds: Wall time of the whole pipeline call.
        patterns: Of every branch where hooks decided.
        computed_steps: Mean over branches, summed over experts.
    """

    seconds: float
    patterns: Patterns = field(default_factory=dict)
    computed_steps: float = float("nan")

    @property
    def is_drawable(self) -> bool:
        """Whether a report can show it: pictures, and series that are not as long as sound."""
        return self.media[0].ndim > 2 or self.media[0].size <= LONGEST_SERIES

    def write_picture(self, file: Path) -> None:
        """Keep the image, the middle frame of a video, or the series for the report."""
        picture = self.media[0]
        if picture.ndim == 4:
            picture = picture[len(picture) // 2]
        dtype = np.float32 if picture.ndim == 2 else np.float16  # pixels lie in [0, 1]
        write_arrays(file, {"image": picture.astype(dtype)})


@dataclass(frozen=True)
class Reference(Made):
    """The uncached result of a prompt.

    Attributes:
        pairs: As recorded on the way.
        floor: The measures of a second uncached run whose inputs differ in the last place: nothing can be nearer.
    """

    pairs: pd.DataFrame
    floor: dict[str, float]

    def write(self, stem: Path) -> None:
        """Keep it in three files that begin with ``stem``; the last one says that it is complete."""
        arrays = {f"media{index}": array for index, array in enumerate(self.media)}
        if self.latents is not None:
            arrays["latents"] = self.latents
        write_arrays(stem.with_suffix(".npz"), arrays)
        self.pairs.to_parquet(stem.with_suffix(".parquet"))
        write_json(stem.with_suffix(".json"), {"floor": self.floor})

    @classmethod
    def load(cls, stem: Path) -> Reference:
        with np.load(stem.with_suffix(".npz")) as stored:
            arrays = dict(stored)
        latents = arrays.pop("latents", None)
        media = [arrays[name] for name in sorted(arrays)]
        pairs = pd.read_parquet(stem.with_suffix(".parquet"))
        return cls(media, latents, pairs, **json.loads(stem.with_suffix(".json").read_text()))


@dataclass(frozen=True)
class Sampler:
    """Generates samples of one session with the same arguments and seeds.

    Attributes:
        images: Where the images that prompts name are.
        finished: Called after every generation.
    """

    session: Session
    images: Mapping[str, Path] | None = None
    finished: Callable[[], object] = lambda: None

    def __call__(
        self, prompt: Prompt, *, num_steps: int | None = None, perturbed: bool = False
    ) -> Sample:
        """One generation of ``prompt`` with its seed, under whatever is applied to the pipeline.

        ``perturbed`` moves all that the denoisers receive by one unit in the last place, as other kernels would.
        """
        session = self.session
        overrides: dict[str, Any] = (
            {"output_type": "np"} if session.accepts("output_type") else {}
        )
        if num_steps is not None:
            if {"sigmas", "timesteps"} & set(session.arguments):
                raise Refused(
                    "the schedule is given step by step (sigmas or timesteps) and cannot be shortened"
                )
            if not session.accepts(STEPS):
                raise Refused(
                    "generate(prompt, seed) takes no num_steps; let it, to compare with"
                )
            overrides[STEPS] = num_steps
        noise = _last_place_noise(session.modules) if perturbed else nullcontext()
        with torch.inference_mode(), noise, _captured_latents(session.pipeline) as latents:
            begun = _time()
            output = session.generate(prompt, self.images, **overrides)
            seconds = _time() - begun
        self.finished()
        flat = np.concatenate([part.ravel() for part in latents]) if latents else None
        return Sample(_media(output), flat, seconds)

    def run(self, setting: Setting, prompt: Prompt) -> Sample:
        """One generation under ``setting``; the pipeline is as before afterwards."""
        if setting.kind == "fewer_steps":
            with second_order(self.session.driver) if setting.options else nullcontext():
                sample = self(prompt, num_steps=setting.budget)
            return replace(sample, computed_steps=float(setting.budget))
        own = setting.kind in ("gate", "plan")
        failing = nullcontext() if own else refusing(f"{setting.policy} fails on this model")
        with _applied(self.session, setting) as patterns_of:
            with failing:
                sample = self(prompt)
            patterns = patterns_of()
        return replace(sample, patterns=patterns, computed_steps=computed_steps(patterns))


@contextmanager
def _applied(session: Session, setting: Setting) -> Iterator[PatternsOf]:
    """Install a cache; the function that is yielded tells the patterns of the generation that followed."""
    options = dict(setting.options)
    if setting.kind in DIFFUSERS_CACHES:
        with diffusers_cache(session.modules, setting.kind, options) as patterns_of:
            yield patterns_of
    elif setting.kind == THROUGH:
        with run_through(session, setting) as patterns_of:
            yield patterns_of
    else:
        if session.driver is None:  # nothing else tells how long the schedule is
            options["num_steps"] = session.num_steps
        entry, plan = setting.entry, setting.plan
        with apply_tea_cache(session.target, entry, schedule=plan, **options) as cache:
            yield lambda: {
                "/".join(key): seen.pattern for key, seen in cache.stats.branches.items()
            }


def _time() -> float:
    """Seconds on the clock, when everything that the GPU was given is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def _last_place_noise(modules: Mapping[str, torch.nn.Module]) -> Iterator[None]:
    """Hooks that move each element that the denoisers receive up or down by one unit in the last place."""
    generator = torch.Generator().manual_seed(0)

    def moved(value: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, value.shape, generator=generator).to(value.device) * 2 - 1
        # A unit in the last place is eps/2 to eps of the value; 0.75 eps rounds to one of them.
        change = 0.75 * torch.finfo(value.dtype).eps * signs.double()
        return (value.double() * (1 + change)).to(value.dtype)

    def before(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """The latents come first: by position, or in the order of the pipeline's keywords."""
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        for name, value in given.items():
            if torch.is_tensor(value) and value.is_floating_point() and value.ndim > 1:
                given[name] = moved(value)
                break
        return tuple(given.pop(index) for index in range(len(args))), given

    hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in modules.values()]
    with taken_off(hooks):
        yield


@contextmanager
def _captured_latents(pipeline: Any) -> Iterator[list[np.ndarray]]:
    """The first argument of every ``vae.decode``: the final latents of any pipeline that decodes."""
    kept: list[np.ndarray] = []
    decoder: Any = getattr(pipeline, "vae", None)
    if not hasattr(decoder, "decode"):
        yield kept
        return
    original = decoder.decode

    def decode(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kept.append(latents.detach().float().cpu().numpy())
        return original(latents, *args, **kwargs)

    decoder.decode = decode
    try:
        yield kept
    finally:
        del decoder.decode


def _media(output: Any) -> list[np.ndarray]:
    """The first sample of everything a pipeline returned that can be looked at or listened to.

    A callable returns its sample itself, or several.
    """
    if isinstance(output, torch.Tensor | np.ndarray):
        output = [output]
    if type(output) not in (list, tuple):
        names = ("images", "frames", "videos", "audios", "audio")
        made = [getattr(output, name, None) for name in names]
        output = [value[0] for value in made if value is not None and len(value) > 0]
    if not output:
        raise NothingSampled(
            "the pipeline's output holds no images, frames or audios; verify needs one of them, "
            "or an array of a generate(prompt, seed)"
        )
    return [_array(sample) for sample in output]


def _array(sample: Any) -> np.ndarray:
    if isinstance(sample, torch.Tensor):
        sample = sample.detach().float().cpu()
    array = np.atleast_2d(sample)
    largest = 255 if array.dtype == np.uint8 else 1
    return array.astype(np.float32) / largest
