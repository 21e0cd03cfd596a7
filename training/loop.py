"""The training loop of the tiny flow-matching models: warm-up and cosine, averaged weights, exact resumption.

A model here is one module that holds everything trained together, the transformer and its text encoders: text
encoders trained end to end need no objective of their own.
"""

import copy
import itertools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopRecipe:
    steps: int
    batch: int
    learning_rate: float
    # Steps at which warm-up and cosine start anew: a finished run can be prolonged without a second one from nothing.
    restarts: tuple[int, ...] = ()
    warmup_steps: int = 100
    final_learning_rate_fraction: float = 0.02
    ema_decay: float = 0.999
    # How often the caption is replaced by the empty one, which classifier-free guidance needs.
    empty_caption_rate: float = 0.12
    checkpoint_every: int = 250
    # Forward passes in bfloat16; weights, optimizer and averages stay in float32.
    bfloat16: bool = False


def draw_sigmas(count: int) -> torch.Tensor:
    """Noise levels, half uniform, half logit-normal: the ends of the schedule are seen often enough as well."""
    size = (count,)
    sigma = torch.where(
        torch.rand(size) < 0.5, torch.rand(size), torch.sigmoid(torch.randn(size))
    )
    return sigma.clamp(0.002, 1.0)


def drop_captions(captions: torch.Tensor, empty: int, rate: float) -> torch.Tensor:
    """Replace some caption rows by the row of the empty caption."""
    return torch.where(torch.rand(captions.shape) < rate, empty, captions)


def learning_rate(recipe: LoopRecipe, step: int) -> float:
    """Linear warm-up, then a cosine down to a small rest, in every stretch between two restarts."""
    edges = (0, *recipe.restarts, recipe.steps)
    start, end = next(pair for pair in itertools.pairwise(edges) if step < pair[1])
    warmup = min(1.0, (step - start + 1) / recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * (step - start) / (end - start)))
    rest = recipe.final_learning_rate_fraction
    return recipe.learning_rate * warmup * (rest + (1 - rest) * cosine)


class Training:
    """The state of a training run, able to save itself and go on later exactly where it was."""

    def __init__(self, model: nn.Module, recipe: LoopRecipe) -> None:
        self.model, self.recipe = model, recipe
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=recipe.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=0.01,
        )
        self.step = 0
        self.cpu_seconds = 0.0
        self.smoothed_loss = 0.0

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def train_step(self, batch_loss: Callable[[nn.Module], torch.Tensor]) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bfloat16):
            loss = batch_loss(self.model)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.update_average()
        self.smoothed_loss = (
            loss.item() if self.step == 0 else 0.98 * self.smoothed_loss + 0.02 * loss.item()
        )
        self.step += 1

    @torch.no_grad()
    def update_average(self) -> None:
        """Exponential moving average that forgets its random start within the first steps."""
        decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(
            list(self.average.parameters()), list(self.model.parameters()), 1 - decay
        )

    def save(self, file: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "device_random": torch.cuda.get_rng_state()
            if self.device.type == "cuda"
            else None,
            "step": self.step,
            "cpu_seconds": self.cpu_seconds,
            "smoothed_loss": self.smoothed_loss,
        }
        partial = file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(file)  # an interrupted save must not destroy the previous checkpoint

    def load(self, file: Path) -> None:
        state = torch.load(file, weights_only=True, map_location="cpu")
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["device_random"])
        self.step = state["step"]
        self.cpu_seconds = state["cpu_seconds"]
        self.smoothed_loss = state["smoothed_loss"]


def run_training(
    training: Training,
    batch_loss: Callable[[nn.Module], torch.Tensor],
    probe: Callable[[nn.Module], dict[str, float]],
    checkpoint: Path,
) -> None:
    """Train to the end, going on from `checkpoint` where it exists; `probe` says how the averaged model does.

    The probe must leave the global random state alone, or a resumed run would differ from one in a single go.
    """
    if checkpoint.exists():
        training.load(checkpoint)
        logger.info("transformer: going on at step %d", training.step)
    last_cpu = time.process_time()
    while training.step < training.recipe.steps:
        training.train_step(batch_loss)
        if (
            training.step % training.recipe.checkpoint_every == 0
            or training.step == training.recipe.steps
        ):
            training.cpu_seconds += time.process_time() - last_cpu
            last_cpu = time.process_time()
            training.save(checkpoint)
            probed = ", ".join(
                f"{name} {value:.3f}" for name, value in probe(training.average).items()
            )
            minutes = training.cpu_seconds / 60
            logger.info(
                "transformer step %d: %.1f CPU min, loss %.4f",
                training.step,
                minutes,
                training.smoothed_loss,
            )
            logger.info("averaged model: %s", probed)
