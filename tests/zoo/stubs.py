"""Stand-ins for optional dependencies that a tiny model needs for something trivial."""

from types import SimpleNamespace

import torch.nn.functional as F


def _resize(image, size, interpolation=None):
    return F.interpolate(image, size=list(size), mode="nearest")


def stub_torchvision() -> None:
    """Let Cosmos run without torchvision, which it uses only to resize the padding mask (nearest neighbour)."""
    from diffusers.models.transformers import transformer_cosmos

    if not hasattr(transformer_cosmos, "transforms"):
        transformer_cosmos.transforms = SimpleNamespace(
            functional=SimpleNamespace(resize=_resize), InterpolationMode=SimpleNamespace(NEAREST="nearest")
        )
