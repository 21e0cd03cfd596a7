"""Denoisers with random weights at published sizes, and loops that call them as a pipeline does.

The sizes are those of the published transformer configurations, one JSON file a model under ``gpu/models/``; at toy
size the same classes have one or two narrow blocks. Only the denoiser is timed: text encoders and decoders run once
per generation and cost the same with and without a cache.
"""

import copy
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runtime import OwnLoop

MODELS = Path(__file__).parent / "gpu" / "models"
TIMED_STEPS = (
    12  # enough for ratios; a whole schedule of the largest model would take minutes a case
)
TOY_STEPS = 6
TOY_TEXT_TOKENS = 4
GUIDANCE = 4.5


@dataclass(frozen=True)
class Workload:
    """A denoiser class at one size, and the generation it is timed on.

    Attributes:
        tokens: Of the latents: height and width after packing, or frames, height and width before patches.
    """

    title: str
    transformer_class: str
    config: dict[str, Any]
    tokens: tuple[int, ...]
    text_tokens: int
    branches: int
    steps: int
    device: str
    dtype: torch.dtype

    @property
    def hidden_bytes(self) -> int:
        """Size of one tensor of the stack's hidden state."""
        tokens = 1
        for size in self.tokens:
            tokens *= size
        if len(self.tokens) == 3:
            tokens //= 4  # patches of 2 x 2
        width = self.config["attention_head_dim"] * self.config["num_attention_heads"]
        return tokens * width * self.dtype.itemsize


def names(toy: bool) -> list[str]:
    """The models to run here, the one most worth knowing first; a CPU runs a scaled one, or all at toy size."""
    if toy or torch.cuda.is_available():
        return ["longcat-image", "wan2.1-1.3b", "flux1-dev", "qwen-image"]
    return ["flux1-scaled"]


def load_workload(name: str, toy: bool) -> Workload:
    """A model's workload on the GPU if there is one; at toy size it also runs on a CPU within a second."""
    model = json.loads((MODELS / f"{name}.json").read_text())
    on_gpu = torch.cuda.is_available()
    tokens = [2, 4, 4][-len(model["tokens"]) :] if toy else model["tokens"]
    return Workload(
        title=model["title"] + (", at toy size" if toy else ""),
        transformer_class=model["transformer_class"],
        config=model["config"] | (model["toy"] if toy else {}),
        tokens=tuple(tokens),
        text_tokens=TOY_TEXT_TOKENS if toy else model["text_tokens"],
        branches=model["branches"],
        steps=TOY_STEPS if toy else TIMED_STEPS,
        device="cuda" if on_gpu else "cpu",
        dtype=torch.bfloat16 if on_gpu else torch.float32,
    )


def build(workload: Workload) -> nn.Module:
    """The denoiser with small random weights, made in its dtype on the device that it runs on."""
    import diffusers

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(workload.dtype)
    try:
        with torch.device(workload.device):
            model = getattr(diffusers, workload.transformer_class)(**workload.config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


class Levels:
    """The scheduler of the timed loop: noise levels from 1 to 0, latents on the line from noise to a fixed image.

    The latents do not follow the predictions: with random weights they would leave every sensible range.
    """

    def __init__(self, noise: torch.Tensor, image: torch.Tensor) -> None:
        self._noise, self._image = noise, image

    def set_timesteps(self, num_steps: int) -> None:
        """Begin a generation."""
        self.sigmas = torch.linspace(1, 0, num_steps + 1)
        self.timesteps = self.sigmas[:-1].clone()
        self.step_index = 0

    def step(
        self, model_output: torch.Tensor, timestep: float, sample: torch.Tensor
    ) -> tuple[torch.Tensor]:
        """The latents at the next level."""
        self.step_index += 1
        share = self.step_index / len(self.timesteps)
        return (torch.lerp(self._noise, self._image, share),)


class TimedLoop(OwnLoop):
    """A denoiser, its scheduler, and one generation as a pipeline runs it, without text encoder and decoder."""

    def __init__(self, workload: Workload) -> None:
        make = _video_arguments if len(workload.tokens) == 3 else _image_arguments
        noise, image, self._arguments = make(workload, _Draw(workload))
        self.workload, self._noise = workload, noise
        super().__init__(build(workload), Levels(noise, image))

    @property
    def model(self) -> nn.Module:
        """The denoiser."""
        return self.modules["transformer"]

    def sharing(self) -> "TimedLoop":
        """Another loop with a denoiser of its own on the same weights: the largest would not fit twice."""
        twin = copy.copy(self)
        shared = {id(parameter): parameter for parameter in self.model.parameters()}
        twin.modules = {"transformer": copy.deepcopy(self.model, shared)}
        return twin

    @torch.inference_mode()
    def generate(self, steps: int | None = None) -> None:
        """One generation."""
        self.scheduler.set_timesteps(steps or self.workload.steps)
        latents = self._noise
        for level in self.scheduler.timesteps.tolist():
            predictions = []
            for branch in range(self.workload.branches):
                with self.model.cache_context(("cond", "uncond")[branch]):
                    arguments = self._arguments(latents, level, branch)
                    predictions.append(self.model(**arguments)[0])
            guided = predictions[0]
            if len(predictions) > 1:
                guided = predictions[1] + GUIDANCE * (predictions[0] - predictions[1])
            (latents,) = self.scheduler.step(guided, level, latents)


class _Draw:
    """Random tensors of a workload's device and dtype, the same every time."""

    def __init__(self, workload: Workload) -> None:
        self._options = {"device": workload.device, "dtype": workload.dtype}
        self._generator = torch.Generator(workload.device).manual_seed(0)

    def __call__(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self._generator, **self._options)


def _image_arguments(
    workload: Workload, draw: _Draw
) -> tuple[torch.Tensor, torch.Tensor, Callable]:
    """Of the classes that take packed latents beside a text: LongCat-Image, FLUX and Qwen-Image."""
    import diffusers

    height, width = workload.tokens
    tokens, channels = height * width, workload.config["in_channels"]
    config, device = workload.config, workload.device
    texts = [
        draw(1, workload.text_tokens, config["joint_attention_dim"])
        for _ in range(workload.branches)
    ]
    ids = torch.zeros(tokens, 3, device=device)
    ids[:, 1] = torch.arange(height, device=device).repeat_interleave(width)
    ids[:, 2] = torch.arange(width, device=device).repeat(height)
    fixed = {
        "img_ids": ids,
        "txt_ids": torch.zeros(workload.text_tokens, 3, device=device),
        "img_shapes": [[(1, height, width)]],
        "encoder_hidden_states_mask": torch.ones(
            1, workload.text_tokens, device=device
        ).long(),
        "return_dict": False,
    }
    if "pooled_projection_dim" in config:
        fixed["pooled_projections"] = draw(1, config["pooled_projection_dim"])
    if config.get("guidance_embeds"):
        fixed["guidance"] = torch.full((1,), 3.5, device=device)
    # Each class takes its own part of these.
    accepted = inspect.signature(
        getattr(diffusers, workload.transformer_class).forward
    ).parameters
    fixed = {name: value for name, value in fixed.items() if name in accepted}

    def arguments(latents: torch.Tensor, time: float, branch: int) -> dict[str, Any]:
        timestep = torch.full((1,), time, device=device, dtype=latents.dtype)
        varying = {"hidden_states": latents, "timestep": timestep}
        return {**fixed, **varying, "encoder_hidden_states": texts[branch]}

    return draw(1, tokens, channels), draw(1, tokens, channels), arguments


def _video_arguments(
    workload: Workload, draw: _Draw
) -> tuple[torch.Tensor, torch.Tensor, Callable]:
    """Of Wan: latents (1, channels, frames, height, width)."""
    texts = [
        draw(1, workload.text_tokens, workload.config["text_dim"])
        for _ in range(workload.branches)
    ]
    size = (1, workload.config["in_channels"], *workload.tokens)

    def arguments(latents: torch.Tensor, time: float, branch: int) -> dict[str, Any]:
        timestep = torch.full((1,), 1000 * time, device=workload.device)
        return {
            "hidden_states": latents,
            "timestep": timestep,
            "encoder_hidden_states": texts[branch],
            "return_dict": False,
        }

    return draw(*size), draw(*size), arguments
