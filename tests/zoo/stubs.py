"""Stand-ins for optional dependencies that a tiny model needs for something trivial."""

from types import SimpleNamespace

import torch.nn.functional as F
from torch.nn.attention import flex_attention


def _resize(image, size, interpolation=None):
    return F.interpolate(image, size=list(size), mode="nearest")


def stub_torchvision() -> None:
    """Let Cosmos run without torchvision, which it uses only to resize the padding mask (nearest neighbour)."""
    from diffusers.models.transformers import transformer_cosmos

    if not hasattr(transformer_cosmos, "transforms"):
        transformer_cosmos.transforms = SimpleNamespace(
            functional=SimpleNamespace(resize=_resize),
            InterpolationMode=SimpleNamespace(NEAREST="nearest"),
        )


def _create_block_mask(*args, _compile=False, **kwargs):
    return flex_attention.create_block_mask(*args, **kwargs)


def stub_mask_compiler() -> None:
    """Let Wan-Animate 2 build its attention mask without a C++ compiler: seconds less, and the same mask."""
    from diffusers.models.transformers import transformer_wan_animate_2

    transformer_wan_animate_2.create_block_mask = _create_block_mask
