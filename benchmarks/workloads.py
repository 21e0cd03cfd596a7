"""Denoisers with random weights at real and at scaled shapes, and loops that call them as a pipeline does.

Only the denoiser is timed: text encoders and decoders run once per image and cost the same with and without a cache.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Shape:
    """A denoiser class at one size, and the generation it is timed on."""

    title: str
    cls: str
    config: dict[str, Any]
    tokens: tuple[int, ...]
    text_tokens: int
    steps: int
    branches: int
    gpu: bool
    dtype: torch.dtype = torch.bfloat16


_JOINT = {"patch_size": 1, "in_channels": 64}
SHAPES = {
    "longcat-image": Shape(
        "LongCat-Image, 6 B, 1024 x 1024, 50 steps, guidance", "LongCatImageTransformer2DModel",
        {**_JOINT, "num_layers": 10, "num_single_layers": 20, "attention_head_dim": 128, "num_attention_heads": 24,
         "joint_attention_dim": 3584, "pooled_projection_dim": 3584, "axes_dims_rope": [16, 56, 56]},
        (64, 64), 512, 50, 2, gpu=True,
    ),
    "flux": Shape(
        "FLUX.1-dev, 12 B, 1024 x 1024, 28 steps", "FluxTransformer2DModel",
        {**_JOINT, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
         "joint_attention_dim": 4096, "pooled_projection_dim": 768, "axes_dims_rope": [16, 56, 56],
         "guidance_embeds": True},
        (64, 64), 512, 28, 1, gpu=True,
    ),
    "wan": Shape(
        "Wan 2.1 T2V 1.3 B, 832 x 480, 81 frames, 50 steps, guidance", "WanTransformer3DModel",
        {"patch_size": (1, 2, 2), "num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16,
         "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 8960, "num_layers": 30},
        (21, 60, 104), 512, 50, 2, gpu=True,
    ),
    "flux-scaled": Shape(
        "FLUX.1 scaled: width 512, 2 + 4 blocks, 1,024 tokens, 12 steps", "FluxTransformer2DModel",
        {**_JOINT, "num_layers": 2, "num_single_layers": 4, "attention_head_dim": 64, "num_attention_heads": 8,
         "joint_attention_dim": 256, "pooled_projection_dim": 256, "axes_dims_rope": [16, 24, 24]},
        (32, 32), 64, 12, 1, gpu=False, dtype=torch.float32,
    ),
}  # fmt: skip


def build(shape: Shape) -> nn.Module:
    """The denoiser with small random weights, made directly on the device that it runs on."""
    import diffusers

    torch.manual_seed(0)
    with torch.device("cuda" if shape.gpu else "cpu"):
        model = getattr(diffusers, shape.cls)(**shape.config)
    return model.to(shape.dtype).eval().requires_grad_(False)


def calls(shape: Shape, steps: int | None = None) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """``(step, branch, arguments)`` of one generation: latents from noise to a fixed image, falling time."""
    steps = steps or shape.steps
    device = torch.device("cuda" if shape.gpu else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    new = lambda *size: torch.randn(*size, generator=generator, device=device, dtype=shape.dtype)  # noqa: E731
    make = _WAN if shape.cls.startswith("Wan") else _JOINT_INPUTS
    latents, image, fixed = make(shape, new)
    for step in range(steps):
        share = step / steps
        for branch in range(shape.branches):
            yield step, branch, fixed(torch.lerp(latents, image, share), 1.0 - share, branch)


def _JOINT_INPUTS(shape: Shape, new: Callable) -> tuple:
    height, width = shape.tokens
    tokens, channels = height * width, shape.config["in_channels"]
    text = [
        new(1, shape.text_tokens, shape.config["joint_attention_dim"])
        for _ in range(shape.branches)
    ]
    pooled = new(1, shape.config["pooled_projection_dim"])
    latents, image = new(1, tokens, channels), new(1, tokens, channels)
    ids = torch.zeros(tokens, 3, device=latents.device)
    ids[:, 1] = torch.arange(height, device=latents.device).repeat_interleave(width)
    ids[:, 2] = torch.arange(width, device=latents.device).repeat(height)

    def arguments(now: torch.Tensor, time: float, branch: int) -> dict[str, Any]:
        given = {
            "hidden_states": now,
            "encoder_hidden_states": text[branch],
            "timestep": torch.full((1,), time, device=now.device, dtype=now.dtype),
            "img_ids": ids,
            "txt_ids": torch.zeros(shape.text_tokens, 3, device=now.device),
            "return_dict": False,
        }
        if shape.cls.startswith("Flux"):
            given["pooled_projections"] = pooled
            if shape.config.get("guidance_embeds"):
                given["guidance"] = torch.full((1,), 3.5, device=now.device)
        return given

    return latents, image, arguments


def _WAN(shape: Shape, new: Callable) -> tuple:
    text = [new(1, shape.text_tokens, shape.config["text_dim"]) for _ in range(shape.branches)]
    size = (1, shape.config["in_channels"], *shape.tokens)

    def arguments(now: torch.Tensor, time: float, branch: int) -> dict[str, Any]:
        return {
            "hidden_states": now,
            "encoder_hidden_states": text[branch],
            "timestep": torch.full((1,), 1000 * time, device=now.device),
            "return_dict": False,
        }

    return new(*size), new(*size), arguments


@torch.inference_mode()
def generate(model: nn.Module, shape: Shape, steps: int | None = None) -> float:
    """One generation; every output is used, as a scheduler would use it."""
    total = torch.zeros((), device="cuda" if shape.gpu else "cpu")
    for _, branch, arguments in calls(shape, steps):
        with _context(model, branch):
            total += model(**arguments)[0].float().mean()
    return float(total)


def _context(model: nn.Module, branch: int) -> Any:
    return model.cache_context(("cond", "uncond")[branch])


def chosen(name: str | None) -> dict[str, Shape]:
    """The shapes to run here: the full ones on a GPU, the scaled one on a CPU."""
    if name is not None:
        return {name: SHAPES[name]}
    return {key: shape for key, shape in SHAPES.items() if shape.gpu == torch.cuda.is_available()}
