"""A deterministic sampler of one's own for the two denoisers, and conditions written as prompts."""

import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from benchmarks.outside.models import (
    LOAD_CHECKPOINT,
    WIND_CHECKPOINT,
    LoadDenoiser,
    WindDenoiser,
    load_weights,
)

NUM_STEPS = 50
# Columns of the wind denoiser's condition that classifier-free guidance zeroes: the regime low, mid or high.
REGIME = slice(19, 22)
# What the package's manifest recommends for wind 3ch: guidance on the regime, and Imagen's dynamic thresholding.
WIND_GUIDANCE = 40.0
THRESHOLD_QUANTILE = 0.99
THRESHOLD_BOUND = 3.5


class DdimScheduler:
    """DDIM without noise: an Euler step in sigma on the sample divided by sqrt(alpha_bar).

    Public as a diffusers scheduler's are: ``timesteps``, ``sigmas`` (one more, the last 0), ``step_index``.

    Args:
        betas: Of the training schedule.
        dynamic_threshold: Whether the predicted clean sample is thresholded.
    """

    def __init__(self, betas: torch.Tensor, dynamic_threshold: bool = False) -> None:
        alpha_bar = torch.cumprod(1 - betas.double(), dim=0)
        self._levels = ((1 - alpha_bar) / alpha_bar).sqrt()
        self._dynamic_threshold = dynamic_threshold
        self.set_timesteps(NUM_STEPS)

    def set_timesteps(self, num_steps: int) -> None:
        """Begin a generation of so many steps, evenly from the last training step to the first."""
        self.timesteps = torch.linspace(len(self._levels) - 1, 0, num_steps).round().long()
        self.sigmas = torch.cat([self._levels[self.timesteps], torch.zeros(1)])
        self.step_index = 0

    def scaled(self, sample: torch.Tensor) -> torch.Tensor:
        """The sample as the denoiser was trained to see it, of unit variance."""
        sigma = self.sigmas[self.step_index]
        return (sample / (1 + sigma**2).sqrt()).float()

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
    ) -> tuple[torch.Tensor]:
        """The sample at the next noise level, from the predicted noise at this one."""
        sigma, following = self.sigmas[self.step_index : self.step_index + 2]
        clean = sample - sigma * model_output
        if self._dynamic_threshold:
            clean = thresholded(clean)
        self.step_index += 1
        return (clean + following * (sample - clean) / sigma,)


def thresholded(clean: torch.Tensor) -> torch.Tensor:
    """Dynamic thresholding: a sample that leaves the bound is clipped at its 99 % quantile and scaled back."""
    magnitude = clean.abs().flatten(1)
    bound = torch.quantile(magnitude, THRESHOLD_QUANTILE, dim=1).clamp_min(THRESHOLD_BOUND)
    bound = bound.view(-1, *(1,) * (clean.ndim - 1))
    return clean.clamp(-bound, bound) / bound * THRESHOLD_BOUND


@dataclass(frozen=True)
class Generator:
    """``generate(prompt, seed, num_steps, scheduler)`` of one denoiser, the shape that ``calibrate.record`` takes.

    Attributes:
        guidance: Scale of classifier-free guidance; 1 calls the denoiser once a step.
    """

    name: str
    model: nn.Module
    scheduler: DdimScheduler
    guidance: float = 1.0

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str,
        seed: int,
        num_steps: int = NUM_STEPS,
        scheduler: DdimScheduler | None = None,
    ) -> np.ndarray:
        """The generated series, shape (channels, values)."""
        scheduler = scheduler or self.scheduler
        scheduler.set_timesteps(num_steps)
        condition = condition_of(prompt, self.model.conditions)
        unguided = condition.clone()
        unguided[:, REGIME] = 0
        noise = torch.randn(
            1,
            self.model.channels,
            self.model.length,
            generator=torch.Generator().manual_seed(seed),
        )
        sample = noise.double() * (1 + scheduler.sigmas[0] ** 2).sqrt()
        for timestep in scheduler.timesteps:
            seen, time = scheduler.scaled(sample), timestep.reshape(1)
            prediction = self.model(seen, time, condition)
            if self.guidance != 1:
                without = self.model(seen, time, unguided)
                prediction = without + self.guidance * (prediction - without)
            (sample,) = scheduler.step(prediction, timestep, sample)
        return sample[0].float().numpy()


def load_generator() -> Generator:
    """Electricity load: linear betas over 1,000 steps, sigma from 157 to 0.01, no guidance."""
    betas = torch.linspace(1e-4, 0.02, 1000)
    model = load_weights(LoadDenoiser(), LOAD_CHECKPOINT)
    return Generator("enerdatasynth-pjm-load", model, DdimScheduler(betas))


def wind_generator() -> Generator:
    """Wind: the cosine schedule over 200 steps, sigma from 4,058 to 0.016, guided."""
    scheduler = DdimScheduler(cosine_betas(200), dynamic_threshold=True)
    model = load_weights(WindDenoiser(), WIND_CHECKPOINT)
    return Generator("enerdatasynth-wind-3ch", model, scheduler, WIND_GUIDANCE)


def cosine_betas(steps: int) -> torch.Tensor:
    """Nichol and Dhariwal's schedule with offset 0.008; betas from 1e-5 to 0.999, as the package clips them."""
    at = (torch.arange(steps + 1) / steps + 0.008) / 1.008
    alpha_bar = torch.cos(at * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(1e-5, 0.999)


def prompts(model: nn.Module, count: int, seed: int) -> list[str]:
    """Random days in words: month, weekday, holiday or wind regime, and three standardised temperatures or loads."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        month, weekday = rng.integers(1, 13), rng.integers(1, 8)
        kind = rng.choice(model.kinds)
        high, low, spread = rng.normal(size=3).round(2)
        found.append(
            f"month {month} weekday {weekday} kind {kind} high {high} low {low} spread {spread}"
        )
    return found


def condition_of(prompt: str, width: int) -> torch.Tensor:
    """The condition that a prompt of :func:`prompts` means, shape (1, width)."""
    month, weekday, kind, *numbers = map(float, re.findall(r"-?\d+\.?\d*", prompt))
    condition = torch.zeros(1, width)
    condition[0, int(month) - 1] = 1
    condition[0, 12 + int(weekday) - 1] = 1
    if kind:
        condition[0, 18 + int(kind)] = 1
    condition[0, -3:] = torch.tensor(numbers)
    return condition
