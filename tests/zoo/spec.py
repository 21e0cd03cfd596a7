"""What one entry of the zoo is, and the step that its inputs are made for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Step:
    """One denoiser call of a made-up trajectory: where it stands, and the random tensors that belong to it.

    Conditioning depends on the seed and the guidance branch only; latents (the same in all branches) and times move
    smoothly with `index`, because a cache gate that compares consecutive steps needs steps that resemble each other.
    Tensors are drawn in float32 and then cast, so a bfloat16 run sees the same numbers, rounded.
    """

    index: int
    total: int = 8
    seed: int = 0
    batch: int = 1
    dtype: torch.dtype = torch.float32
    branch: int = 0
    shared: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def progress(self) -> float:
        """0 at the first step (noise), close to 1 at the last."""
        return self.index / self.total

    def fixed(self, *shape: int, salt: int) -> torch.Tensor:
        """Random conditioning; `salt` keeps the inputs of one call apart."""
        generator = torch.Generator().manual_seed(1000 * self.seed + 100 * self.branch + salt)
        return torch.randn(*shape, generator=generator).to(self.dtype)

    def latents(self, *shape: int, salt: int = 0) -> torch.Tensor:
        """A point on the straight line from noise to a fixed "image"."""
        generator = torch.Generator().manual_seed(1000 * self.seed + 500 + salt)
        noise = torch.randn(*shape, generator=generator)
        image = torch.randn(*shape, generator=generator)
        return torch.lerp(noise, image, self.progress).to(self.dtype)

    def falling(self, scale: float = 1000.0) -> torch.Tensor:
        """The usual time: `scale` at the first step, towards 0. Kept in float32, as schedulers do."""
        return torch.full((self.batch,), scale * (1.0 - self.progress))

    def rising(self, scale: float = 1.0) -> torch.Tensor:
        """Time of the classes in which 0 is noise."""
        return torch.full((self.batch,), scale * self.progress)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """An object that the steps of one trajectory share (a key/value cache); made anew at step 0."""
        if self.index == 0 or name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]


@dataclass(frozen=True)
class TinyModel:
    """A denoiser class at a size that runs in milliseconds, and the ground truth tests may rely on.

    `blocks` names the block lists the generated stream runs through, in the order of the first call (dotted where a
    list sits in a container); `idle` are positions of blocks that these inputs leave out. `streams` is 2 where a
    second generated stream, such as audio, leaves the stack as its own tensor. `time` names the argument that carries
    the time and `rises` tells its direction. `pipelines` says which of the class's pipelines keep their guidance
    branches apart with `cache_context`. `stub` replaces an optional dependency before the model is built; `finish`
    does to the built model what its pipeline would.
    """

    name: str
    cls: str
    init: Mapping[str, Any]
    inputs: Callable[[Step], dict[str, Any]]
    blocks: tuple[str, ...] = ("transformer_blocks",)
    streams: int = 1
    time: str = "timestep"
    rises: bool = False
    idle: tuple[int, ...] = ()
    pipelines: str = "no cache_context"
    remarks: str = ""
    stub: Callable[[], None] | None = None
    finish: Callable[[nn.Module], None] | None = None


def table(*models: TinyModel) -> dict[str, TinyModel]:
    """Models by name; a name given twice is a mistake in the zoo, not an override."""
    result = {model.name: model for model in models}
    if len(result) != len(models):
        raise ValueError("two tiny models share a name")
    return result
