"""Inner products of all steps of a generation, from which the error of any linear forecast follows without a GPU.

Outputs are kept in the model's dtype, on the device while all steps of all branches stay under ``OUTPUT_BYTES`` and in
the host's memory beyond that.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

OUTPUT_BYTES = 256 * 2**20
_Key = tuple[str, int]  # branch, step
_GUIDED = ""  # in the place of a branch: what a scheduler receives, made of all branches
_COLUMNS = 2**18  # elements of each row that are multiplied at once, in float64
# Beyond it the two halves are so nearly parallel that their shares in the guided prediction are rounding errors.
_WORST_CONDITION = 1e10


def gram_matrix(rows: list[Tensor]) -> Tensor:
    """All inner products of the flat ``rows``, summed in float64: shape (rows, rows)."""
    if rows[0].device.type == "mps":  # knows no float64
        rows = [row.cpu() for row in rows]
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows[0].device)
    for begin in range(0, rows[0].numel(), _COLUMNS):
        piece = torch.stack([row[begin : begin + _COLUMNS] for row in rows]).double()
        total += piece @ piece.T
    return total


class Products:
    """Keeps what is needed of one generation of one denoiser, and multiplies it at the end.

    Where a pipeline gives the denoiser both guidance branches in one call, one half of the batch each, they are kept
    apart: what matters is the error of their guided combination.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the generation."""
        self._outputs: dict[_Key, Tensor] = {}  # with the guided predictions among them
        self._on_host = False
        self._halved: str | None = None
        self._batch = 0

    @property
    def held_bytes(self) -> int:
        """Bytes held on the device."""
        return 0 if self._on_host else sum(tensor.nbytes for tensor in self._outputs.values())

    def add_latents(self, branch: str, latents: Any) -> None:
        """What the denoiser is given, before anything else of that step: tells whether it is two halves."""
        if (
            self._outputs
            or not isinstance(latents, Tensor)
            or latents.ndim < 2
            or len(latents) % 2
        ):
            return
        first, second = latents.detach().chunk(2)
        if torch.equal(first, second):
            self._halved, self._batch = branch, len(latents)

    def add_output(self, branch: str, step: int, value: Tensor) -> None:
        """What the denoiser returned at a step."""
        if self._halved == branch and value.ndim > 1 and len(value) == self._batch:
            first, second = value.chunk(2)
            self._outputs[f"{branch}/0", step] = self._flat(first)
            self._outputs[f"{branch}/1", step] = self._flat(second)
        else:
            self._outputs[branch, step] = self._flat(value)

    def add_guided(self, step: int, value: Tensor) -> None:
        """What a scheduler received at a step; several of one step (picture and sound) are parts of it."""
        flat, before = self._flat(value), self._outputs.get((_GUIDED, step))
        self._outputs[_GUIDED, step] = flat if before is None else torch.cat([before, flat])

    def _flat(self, value: Tensor) -> Tensor:
        """A copy of an output, on the device while all of them stay under ``OUTPUT_BYTES``."""
        flat = value.detach().reshape(-1)
        if not self._on_host and flat.nbytes * (len(self._outputs) + 1) > OUTPUT_BYTES:
            self._on_host = True
            self._outputs = {key: tensor.cpu() for key, tensor in self._outputs.items()}
        return flat.to("cpu" if self._on_host else flat.device, copy=True)

    def matrices(
        self,
        expert: str,
        sigma: Callable[[int], float | None] = lambda step: None,
        over_ranks: Callable[[Tensor], Tensor] = lambda matrix: matrix,
    ) -> dict[str, np.ndarray]:
        """The arrays of a run's ``gram/<group>.npz`` for this denoiser, named as in :mod:`calibrate.runs.gram_log`.

        Args:
            sigma: Noise level of a step, also of the one after the last.
            over_ranks: Takes a matrix and gives its sum over the ranks that share the sequence.

        Returns:
            Empty where steps differ in shape, or a branch lacks a step: nothing could be planned from it.
        """
        names = {branch for branch, _ in self._outputs} - {_GUIDED}
        branches = sorted(names, key=lambda name: (name != "cond", name))
        steps = sorted({step for branch, step in self._outputs if branch != _GUIDED})
        arrays: dict[str, Any] = {"branches": branches}
        if self._halved and branches == [f"{self._halved}/0", f"{self._halved}/1"]:
            guidance = self._guidance(branches, steps)
            # Where nothing can be measured, diffusers' usual order: the unconditional half first.
            if guidance is None or guidance >= 0.5:
                branches = branches[::-1]
            arrays = {"branches": ["cond", "uncond"], "joint": self._halved}
            if guidance is not None:
                arrays["guidance"] = max(guidance, 1 - guidance)
        outputs = self._rows([(branch, step) for branch in branches for step in steps])
        guided = self._rows([(_GUIDED, step) for step in steps])
        if not outputs or len(steps) <= steps[-1] - steps[0]:
            return {}
        arrays["output"] = over_ranks(gram_matrix(outputs)).cpu().numpy()
        if guided:
            arrays["guided"] = over_ranks(gram_matrix(guided)).cpu().numpy()
        levels = [sigma(step) for step in (*steps, steps[-1] + 1)]
        arrays["first_step"] = steps[0]
        arrays["sigmas"] = np.array(levels, dtype=float)  # NaN where there are none
        return {f"{expert}/{name}": np.array(value) for name, value in arrays.items()}

    def _guidance(self, halves: list[str], steps: list[int]) -> float | None:
        """Share g of the second half in the guided prediction, ``(1 - g) first + g second``, median over steps.

        Above 1 the second half is the conditional one, below 0 the first. ``None`` where no step tells.
        """
        shares = []
        for step in steps:
            rows = self._rows([(name, step) for name in (*halves, _GUIDED)])
            if not rows:
                continue
            products = gram_matrix(rows).cpu().numpy()
            if np.linalg.cond(products[:2, :2]) < _WORST_CONDITION:
                first, second = np.linalg.solve(products[:2, :2], products[:2, 2])
                shares.append(second / (first + second) if first + second else np.nan)
        finite = [share for share in shares if np.isfinite(share)]
        return float(np.median(finite)) if finite else None

    def _rows(self, keys: list[_Key]) -> list[Tensor]:
        """What is kept at ``keys``; nothing where one is missing, or they differ in size."""
        rows = [self._outputs[key] for key in keys if key in self._outputs]
        sizes = {row.numel() for row in rows}
        return rows if len(rows) == len(keys) and len(sizes) == 1 else []
