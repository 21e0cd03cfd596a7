"""The second and the third tiny model, trained larger here, then recorded, planned and verified in bfloat16.

What the other cases measure has random weights: it says what a skipped step saves, not what it costs in quality.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.study import Study, carry_out
from training.tiny_longcat_image.data import evenly_ordered_captions as digit_captions
from training.tiny_sd3 import __main__ as tiny_sd3
from training.tiny_sd3.recipe import Recipe as Sd3Recipe
from training.tiny_wan import __main__ as tiny_wan
from training.tiny_wan.data import FRAMES
from training.tiny_wan.data import evenly_ordered_captions as shape_captions
from training.tiny_wan.recipe import Recipe as WanRecipe

FOLDER = Path(__file__).resolve().parents[2] / "build" / "gpu"
STUDY = Study(50, (25, 12, 8), recorded=20, choosing=6, planned=6, judged=24)
TOY_STUDY = Study(6, (3,), recorded=3, choosing=1, planned=1, judged=3)
POLICIES = (
    *("gate", "plan", "uniform", "uniform-fitted", "uniform-linear-guided"),
    *("magcache", "fewer-steps", "fewer-steps-2"),
)
GUIDANCE = 4.5
TEXT_SLOTS = 16  # of both text encoders in training; more would be zeros that take part in the attention


def sd3_recipe(toy: bool) -> Sd3Recipe:
    """64 x 64 pixels and a transformer of 4.7 million parameters; the autoencoder is the embedded model's."""
    recipe, device = Sd3Recipe(), device_here()
    if toy:
        transformer = replace(recipe.transformer, blocks=2, heads=2)
        loop = replace(recipe.loop, steps=8, warmup_steps=1, batch=2, bfloat16=True)
        return replace(
            recipe, side=16, pictures=4, transformer=transformer, loop=loop, device=device
        )
    transformer = replace(recipe.transformer, blocks=8, heads=4, head_dim=32)
    loop = replace(recipe.loop, learning_rate=1e-3, bfloat16=True)
    return replace(recipe, side=64, transformer=transformer, loop=loop, device=device)


def wan_recipe(toy: bool) -> WanRecipe:
    """Frames of 64 x 64 pixels and a transformer of 5.1 million parameters."""
    recipe, device = WanRecipe(), device_here()
    if toy:
        autoencoder = replace(recipe.autoencoder, steps=1, refining_steps=1, batch=1)
        transformer = replace(recipe.transformer, blocks=2, heads=2)
        loop = replace(
            recipe.loop, steps=8, restarts=(), warmup_steps=1, batch=2, bfloat16=True
        )
        parts = {"autoencoder": autoencoder, "transformer": transformer, "loop": loop}
        return replace(recipe, side=16, clips_per_caption=1, device=device, **parts)
    autoencoder = replace(recipe.autoencoder, base_channels=32, batch=16)
    transformer = replace(
        recipe.transformer, blocks=8, heads=6, head_dim=32, feed_forward=768
    )
    loop = replace(recipe.loop, learning_rate=1e-3, bfloat16=True)
    parts = {"autoencoder": autoencoder, "transformer": transformer, "loop": loop}
    return replace(recipe, side=64, device=device, **parts)


def device_here() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Kind:
    """A tiny model: how it is trained, what it is asked for, and how its pipeline is called."""

    train: Callable[[Path, int, Any], None]
    recipe: Callable[[bool], Any]
    captions: Callable[[], list[Any]]
    call: dict[str, Any]


KINDS = {
    "tiny-sd3": Kind(tiny_sd3.train, sd3_recipe, digit_captions, {}),
    "tiny-wan": Kind(tiny_wan.train, wan_recipe, shape_captions, {"num_frames": FRAMES}),
}


@dataclass(frozen=True)
class Subject:
    """A tiny model at a size."""

    name: str
    toy: bool

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def recipe(self) -> Any:
        return self.kind.recipe(self.toy)

    @property
    def title(self) -> str:
        side = self.recipe.side
        return f"{self.name}, {side} x {side}, bfloat16{', toy size' if self.toy else ''}"

    @property
    def folder(self) -> Path:
        return FOLDER / (f"{self.name}-toy" if self.toy else self.name)


def measure(subject: Subject, rounds: int) -> dict[str, Any]:
    """Quality of every policy at every budget, paired by prompt. Goes on where an earlier call was cut off."""
    recipe, folder = subject.recipe, subject.folder
    if not (folder / "trained").exists():
        subject.kind.train(folder / "model", 0, recipe)
        (folder / "trained").touch()
    call = {
        **{"guidance_scale": GUIDANCE, "height": recipe.side, "width": recipe.side},
        **{"device": recipe.device, "pipe_args": {"max_sequence_length": TEXT_SLOTS}},
        **subject.kind.call,
    }
    prompts = [caption.text for caption in subject.kind.captions()]
    study = TOY_STUDY if subject.toy else STUDY
    figures = carry_out(study, folder / "run", str(folder / "model"), prompts, call, POLICIES)
    checkpoint = torch.load(folder / "model.work" / "transformer.pt", map_location="cpu")
    weights = checkpoint["average"].items()
    count = sum(value.numel() for name, value in weights if name.startswith("transformer."))
    return {
        **{"parameters": count, "trained_steps": checkpoint["step"]},
        **{"training_loss": checkpoint["smoothed_loss"], **figures},
    }
