"""Inner products of all steps of a generation, from which the error of any linear forecast follows without a GPU.

Outputs are exact: they are kept in the model's dtype, on the device while all steps of all branches stay under
``OUTPUT_BYTES`` and in the host's memory beyond that. Residuals are kept in float32 on the device while they stay
under ``RESIDUAL_BYTES``; beyond that every residual, those kept so far included, is reduced to ``SKETCH_SIZE`` numbers
by a fixed random projection. So a denoiser holds at most ``OUTPUT_BYTES + RESIDUAL_BYTES`` on the device (320 MiB).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

OUTPUT_BYTES = 256 * 2**20
RESIDUAL_BYTES = 64 * 2**20
# A prime, so that the channels of a token do not fall into the same cells again and again.
SKETCH_SIZE = 8191
SKETCH_ERROR = (
    2 / SKETCH_SIZE
) ** 0.5  # relative standard error of a squared norm, of a forecast's error as well
_SIGNS = SKETCH_SIZE * 128
_ROLL = 7919
_COLUMNS = 2**18  # elements of each row that are multiplied at once, in float64


def random_signs(device: torch.device | str = "cpu") -> Tensor:
    """The fixed signs of the sketch, shape (``SKETCH_SIZE * 128``,), the same on every machine."""
    generator = np.random.Generator(np.random.PCG64(20240229))
    return torch.from_numpy(generator.integers(0, 2, _SIGNS, dtype=np.int8) * 2 - 1).to(device)


def sketch(value: Tensor, signs: Tensor, minus: Tensor | None = None) -> Tensor:
    """A linear random projection to ``SKETCH_SIZE`` numbers that keeps inner products in the mean (count sketch).

    Element i is added with a random sign to cell i modulo ``SKETCH_SIZE``. The relative standard error of a squared
    norm is ``sqrt(2 / SKETCH_SIZE)``, 1.6 %; as the map is linear this holds for the error of a forecast itself,
    however small it is beside the residuals. With ``minus`` it is that of the difference, formed in float32.
    """
    total = torch.zeros(SKETCH_SIZE, device=value.device)
    others = None if minus is None else minus.reshape(-1).split(_SIGNS)
    for index, piece in enumerate(value.reshape(-1).split(_SIGNS)):
        difference = piece.float() if others is None else piece.float() - others[index].float()
        signed = difference * signs.roll(index * _ROLL)[: piece.numel()]
        missing = -len(signed) % SKETCH_SIZE
        total += torch.nn.functional.pad(signed, (0, missing)).view(-1, SKETCH_SIZE).sum(0)
    return total


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
        self._signs: Tensor | None = None
        self.clear()

    def clear(self) -> None:
        """Forget the generation."""
        self._outputs: dict[tuple[str, int], Tensor] = {}
        self._residuals: dict[tuple[str, int], Tensor] = {}
        self._guided: dict[int, Tensor] = {}
        self._sigmas: dict[int, float] = {}
        self._sketched = self._on_host = False
        self._halved: str | None = None
        self._batch = 0

    @property
    def held_bytes(self) -> int:
        """Bytes held on the device."""
        kept = list(self._residuals.values())
        if not self._on_host:
            kept += [*self._outputs.values(), *self._guided.values()]
        return sum(tensor.nbytes for tensor in kept)

    def add_latents(self, branch: str, latents: Any) -> None:
        """What the denoiser is given, before anything else of that step: tells whether it is two halves."""
        if self._outputs or not isinstance(latents, Tensor) or latents.ndim < 2 or len(latents) % 2:
            return
        first, second = latents.detach().chunk(2)
        if torch.equal(first, second):
            self._halved, self._batch = branch, len(latents)

    def add_output(self, branch: str, step: int, value: Tensor) -> None:
        for name, part in self._parts(branch, value):
            self._outputs[name, step] = self._flat(part)

    def add_guided(self, step: int, value: Tensor) -> None:
        """What a scheduler received at a step; several of one step (picture and sound) are parts of it."""
        flat, before = self._flat(value), self._guided.get(step)
        self._guided[step] = flat if before is None else torch.cat([before, flat])

    def _flat(self, value: Tensor) -> Tensor:
        """A copy of an output, on the device while all of them stay under ``OUTPUT_BYTES``."""
        flat = value.detach().reshape(-1)
        count = len(self._outputs) + len(self._guided) + 1
        if not self._on_host and flat.nbytes * count > OUTPUT_BYTES:
            self._on_host = True
            self._outputs = {key: tensor.cpu() for key, tensor in self._outputs.items()}
            self._guided = {key: tensor.cpu() for key, tensor in self._guided.items()}
        return flat.cpu() if self._on_host else flat.clone()

    def add_residual(self, branch: str, step: int, hidden: Tensor, entry: Tensor | None) -> None:
        parts = self._parts(branch, hidden.detach())
        before: list[Tensor | None] = [None] * len(parts)
        if entry is not None:
            before = [part for _, part in self._parts(branch, entry.detach())]
        for (name, part), entered in zip(parts, before, strict=False):
            self._add_residual(name, step, part, entered)

    def _add_residual(self, name: str, step: int, hidden: Tensor, entry: Tensor | None) -> None:
        if not self._sketched and 4 * hidden.numel() * (len(self._residuals) + 1) > RESIDUAL_BYTES:
            self._sketched = True
            self._residuals = {key: self._sketch(tensor) for key, tensor in self._residuals.items()}
        if self._sketched:
            self._residuals[name, step] = self._sketch(hidden, entry)
            return
        residual = hidden.reshape(-1).to(torch.float32, copy=True)
        if entry is not None:
            residual -= entry.reshape(-1)
        self._residuals[name, step] = residual

    def add_sigma(self, step: int, sigma: float | None) -> None:
        if sigma is not None:
            self._sigmas[step] = sigma

    def _parts(self, branch: str, value: Tensor) -> list[tuple[str, Tensor]]:
        """The value under its branch's name; or its two halves."""
        if self._halved != branch or value.ndim < 2 or len(value) != self._batch:
            return [(branch, value)]
        return list(zip(_halves(branch), value.chunk(2), strict=True))

    def _sketch(self, value: Tensor, minus: Tensor | None = None) -> Tensor:
        if self._signs is None or self._signs.device != value.device:
            self._signs = random_signs(value.device)
        return sketch(value, self._signs, minus)

    def matrices(self, expert: str, over_ranks: Any = None) -> dict[str, np.ndarray]:
        """The arrays of a run's ``gram/<group>.npz`` for this denoiser, named as in :mod:`calibrate.runs.gram_log`.

        Args:
            over_ranks: Takes a matrix and gives its sum over the ranks that share the sequence.

        Returns:
            Empty where steps differ in shape, or a branch lacks a step: nothing could be planned from it.
        """
        branches = sorted({branch for branch, _ in self._outputs})
        branches.sort(key=lambda name: name != "cond")
        steps = sorted({step for _, step in self._outputs})
        arrays: dict[str, Any] = {"branches": branches}
        if self._halved is not None and branches == _halves(self._halved):
            guidance = self._guidance(branches)
            # Where nothing can be measured, diffusers' usual order: the unconditional half first.
            if guidance is None or guidance >= 0.5:
                branches = branches[::-1]
            arrays = {"branches": ["cond", "uncond"], "joint": self._halved}
            if guidance is not None:
                arrays["guidance"] = max(guidance, 1 - guidance)
        keys = [(branch, step) for branch in branches for step in steps]
        gapless = steps == list(range(steps[0], steps[-1] + 1)) if steps else False
        if not gapless or not _alike(self._outputs, keys):
            return {}
        sources: list[tuple[str, Mapping[Any, Tensor], list]] = [
            ("output", self._outputs, keys),
            ("residual", self._residuals, keys),
            ("guided", self._guided, steps),
        ]
        for name, source, rows in sources:
            if _alike(source, rows):
                matrix = gram_matrix([source[row] for row in rows])
                arrays[name] = (matrix if over_ranks is None else over_ranks(matrix)).cpu().numpy()
        arrays["first_step"] = steps[0]
        arrays["sigmas"] = [self._sigmas.get(step, np.nan) for step in (*steps, steps[-1] + 1)]
        arrays["residual_error"] = SKETCH_ERROR if self._sketched else 0.0
        return {f"{expert}/{name}": np.array(value) for name, value in arrays.items()}

    def _guidance(self, halves: list[str]) -> float | None:
        """Share g of the second half in the guided prediction, ``(1 - g) first + g second``, median over steps.

        Above 1 the second half is the conditional one, below 0 the first. ``None`` where no step tells.
        """
        shares = []
        for step, guided in self._guided.items():
            rows = [self._outputs[half, step] for half in halves if (half, step) in self._outputs]
            if len(rows) < 2 or rows[0].numel() != guided.numel():
                continue
            products = gram_matrix([*rows, guided.to(rows[0].device)]).cpu().numpy()
            if np.linalg.cond(products[:2, :2]) < 1e10:
                first, second = np.linalg.solve(products[:2, :2], products[:2, 2])
                shares.append(second / (first + second) if first + second else np.nan)
        finite = [share for share in shares if np.isfinite(share)]
        return float(np.median(finite)) if finite else None


def _halves(branch: str) -> list[str]:
    return [f"{branch}/0", f"{branch}/1"]


def _alike(source: Mapping[Any, Tensor], keys: list) -> bool:
    return set(source) == set(keys) and len({tensor.numel() for tensor in source.values()}) == 1
