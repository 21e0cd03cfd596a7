"""LPIPS, an optional measure: needs the ``lpips`` package and the trunk's weights in a local file.

Weights are never downloaded here: a figure from weights that nobody can name cannot be compared.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from numpy.typing import ArrayLike

from calibrate.trials.measures import MetricError

VARIANT = "LPIPS v0.1, AlexNet, images scaled to [-1, 1]"


class Lpips:
    """LPIPS of images (height, width, 3) in [0, 1].

    Args:
        weights: The AlexNet trunk of torchvision (``alexnet-owt-*.pth``), or a folder that holds it.

    Raises:
        MetricError: If the package or the weights are missing, with what to do about it.
    """

    def __init__(self, weights: str | os.PathLike) -> None:
        path = Path(weights)
        if path.is_dir():
            path = next(iter(sorted(path.glob("alexnet*.pth"))), path / "alexnet-owt-7be5be79.pth")
        if not path.is_file():
            raise MetricError(
                f"{path}: no such file; LPIPS needs torchvision's AlexNet weights (alexnet-owt-7be5be79.pth)"
            )
        try:
            import lpips
        except ImportError as error:
            raise MetricError(
                f"LPIPS needs the package lpips ({error}); run `pip install lpips`"
            ) from None
        import torch

        self.checksum = hashlib.sha256(path.read_bytes()).hexdigest()
        # pnet_rand: build the trunk without downloading it; its weights follow from the file.
        self._model = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False).eval()
        state = torch.load(path, map_location="cpu", weights_only=True)
        trunk = {
            name.removeprefix("features."): value
            for name, value in state.items()
            if name.startswith("features.")
        }
        own = self._model.net.state_dict()
        # lpips names the same layers slice1.0, slice2.3, ...: the last two parts are torchvision's.
        missing = [name for name in own if ".".join(name.split(".")[-2:]) not in trunk]
        if missing:
            raise MetricError(
                f"{path}: lacks {missing[0]} of the AlexNet trunk; give torchvision's alexnet weights"
            )
        self._model.net.load_state_dict(
            {name: trunk[".".join(name.split(".")[-2:])] for name in own}
        )

    def __call__(self, candidate: ArrayLike, reference: ArrayLike) -> float:
        """The distance; 0 for identical images."""
        import numpy as np
        import torch

        tensors = [
            torch.tensor(np.asarray(image, np.float32)).permute(2, 0, 1)[None]
            for image in (candidate, reference)
        ]
        with torch.inference_mode():
            return float(self._model(*tensors, normalize=True))
