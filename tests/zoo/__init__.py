"""A zoo of tiny denoisers: every class of diffusers with a repeated block stack, with random weights.

The hooks of the runtime are generic, so the only convincing test is to run them on all classes. Each entry builds
in milliseconds and runs on one CPU thread; nothing is downloaded. Typical use:

    model = zoo.build("flux")
    for kwargs in zoo.trajectory("flux", total=8):
        outputs = zoo.run(model, kwargs)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from torch import nn

from . import (
    audio,
    flux,
    image_cross,
    image_joint,
    image_qwen,
    image_single,
    video_audio,
    video_cross,
    video_joint,
    video_wan,
)
from .spec import Step, TinyModel

__all__ = ["TINY", "TinyModel", "build", "inputs", "run", "trajectory"]

_FAMILIES = (
    flux,
    image_qwen,
    image_joint,
    image_single,
    image_cross,
    video_wan,
    video_joint,
    video_cross,
    video_audio,
    audio,
)
TINY: dict[str, TinyModel] = {
    name: model for family in _FAMILIES for name, model in family.MODELS.items()
}
assert len(TINY) == sum(len(family.MODELS) for family in _FAMILIES), (
    "two families share a name"
)

_shared: dict[tuple, dict[str, Any]] = {}


def build(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> nn.Module:
    """The tiny model in eval mode; `overrides` replace init arguments. The global random state is left alone."""
    tiny = TINY[name]
    if tiny.stub:
        tiny.stub()
    with torch.random.fork_rng(devices=[]), _marked_memory():
        torch.manual_seed(seed)
        model = getattr(diffusers, tiny.cls)(**{**tiny.init, **overrides}).eval()
        _fill(model)
    if tiny.finish:
        tiny.finish(model)
    return _cast(model, dtype)


@contextmanager
def _marked_memory() -> Iterator[None]:
    """Let torch.empty return NaN, so that parameters which a class leaves uninitialised can be told from the rest."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Give small noise to all-zero parameters, and values to uninitialised ones.

    With zero gates, modulation tables or output projections a block adds nothing and a wrong residual goes unseen.
    """
    for parameter in model.parameters():
        if parameter.isnan().any():
            parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
        elif not parameter.any():
            parameter.copy_(0.05 * torch.randn(parameter.shape))


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the weights as `from_pretrained(torch_dtype=...)` would: some modules are declared to stay in float32."""
    keep = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not keep.intersection(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return model


def inputs(
    name: str,
    step: int,
    total: int = 8,
    seed: int = 0,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    branch: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of the forward at one step: fixed conditioning, drifting latents, moving time.

    Another `branch` (0 to 4) has other conditioning and the same latents, as the two calls of guidance have.

    Where a class fills a key/value cache at the first step, the steps asked for after a step 0 of the same settings
    share that cache; use `trajectory` to run two of them side by side.
    """
    settings = (total, seed, batch, dtype, branch)
    if step == 0:
        _shared[name, *settings] = {}
    return TINY[name].inputs(Step(step, *settings, _shared.setdefault((name, *settings), {})))


def trajectory(
    name: str,
    total: int = 8,
    seed: int = 0,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    branch: int = 0,
) -> Iterator[dict[str, Any]]:
    """The inputs of all steps of one trajectory, which shares its key/value cache with no other."""
    shared: dict[str, Any] = {}
    for index in range(total):
        yield TINY[name].inputs(Step(index, total, seed, batch, dtype, branch, shared))


@torch.no_grad()
def run(model: nn.Module, kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """Call the model and return every tensor of its prediction, in order, whatever it is wrapped in."""
    output = model(**kwargs)
    given, returned = kwargs.get("kv_cache"), getattr(output, "kv_cache", None)
    if returned is not None and returned is not given:
        # FLUX.2 returns a new cache instead of filling the one it is given, which the later steps hold
        vars(given).update(vars(returned))
    return tuple(_tensors(output))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key != "kv_cache":
                yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
