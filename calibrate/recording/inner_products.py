"""Inner products of all steps of a generation, and what its solver saw: what plans are made from.

Tensors are kept in the model's dtype, on the device while those of all steps stay under ``OUTPUT_BYTES`` and in the
host's memory beyond that.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibrate.runs.trajectory import Trajectory

OUTPUT_BYTES = 256 * 2**20
_Key = tuple[str, int]  # branch, step
# In the place of a branch: what a scheduler receives, made of all branches, and the latents that it moves.
_GUIDED, _LATENTS = "(guided)", "(latents)"
_LEAST_STEPS = 3  # of fewer there is nothing to plan
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


# Of one step of a solver: the denoiser's name, the prediction and the latents before it.
SolverStep = tuple[str, Tensor, Tensor]


def trajectory_of(
    steps: Sequence[SolverStep], end: Tensor | None, sigmas: Any
) -> Trajectory | None:
    """What a solver saw of a generation; ``None`` where no plan can be made of it: too short, uneven, not finite.

    Args:
        end: The latents after the last step.
        sigmas: The scheduler's noise levels, where it has some.
    """
    states = [latents for _, _, latents in steps]
    sizes = {state.numel() for state in states} | {own.numel() for _, own, _ in steps}
    if len(steps) < _LEAST_STEPS or end is None or sizes != {end.numel()}:
        return None
    states.append(end)
    latents = torch.stack([state.float().cpu().view_as(end) for state in states])
    predictions = [prediction.cpu().flatten() for _, prediction, _ in steps]
    gram = gram_matrix(predictions)
    if not (gram.isfinite().all() and latents.isfinite().all()):
        return None
    flat, solver = latents.flatten(1), []
    for before, prediction, after in zip(flat[:-1], predictions, flat[1:], strict=True):
        both = np.stack([before.double(), prediction.double()], axis=1)
        solver.append(np.linalg.lstsq(both, after.double().numpy(), rcond=None)[0])
    levels = np.full(len(latents), np.nan)
    if sigmas is not None and len(sigmas) == len(latents):
        levels = torch.as_tensor(sigmas).double().cpu().numpy()
    experts = np.array([expert for expert, _, _ in steps])
    return Trajectory(latents.numpy(), gram.numpy(), np.transpose(solver), levels, experts)


class Products:
    """Keeps what is needed of one generation of one denoiser, and multiplies it at the end.

    Where a pipeline gives the denoiser both guidance branches in one call, one half of the batch each, they are kept
    apart: what matters is the error of their guided combination.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the generation."""
        self._kept: dict[_Key, Tensor] = {}
        self._on_host = False
        self._halved: tuple[str, int] | None = None  # the branch, and how long its batch is

    @property
    def held_bytes(self) -> int:
        """Bytes held on the device."""
        return 0 if self._on_host else sum(tensor.nbytes for tensor in self._kept.values())

    def add_latents(self, branch: str, latents: Any) -> None:
        """What the denoiser is given, before anything else of that step: tells whether it is two halves."""
        if not self._kept and isinstance(latents, Tensor) and latents.ndim > 1:
            halves = latents.detach().chunk(2)
            if len(halves) == 2 and torch.equal(*halves):
                self._halved = branch, len(latents)

    def add_output(self, branch: str, step: int, value: Tensor) -> None:
        """What the denoiser returned at a step."""
        parts = {branch: value}
        if value.ndim > 1 and self._halved == (branch, len(value)):
            first, second = value.chunk(2)
            parts = {f"{branch}/0": first, f"{branch}/1": second}
        for name, part in parts.items():
            self._kept[name, step] = self._flat(part)

    def add_step(self, step: int, prediction: Tensor, latents: Any) -> None:
        """What a scheduler received at a step; several of one step (picture and sound) are parts of it."""
        flat, before = self._flat(prediction), self._kept.get((_GUIDED, step))
        self._kept[_GUIDED, step] = flat if before is None else torch.cat([before, flat])
        if isinstance(latents, Tensor) and latents.shape == prediction.shape:
            self._kept[_LATENTS, step] = self._flat(latents)

    def solver_steps(self, expert: str) -> dict[int, SolverStep]:
        """The steps of the solver whose latents were seen."""
        return {
            step: (expert, self._kept[_GUIDED, step], latents)
            for (name, step), latents in self._kept.items()
            if name == _LATENTS
        }

    def _flat(self, value: Tensor) -> Tensor:
        """A copy, on the device while all of them stay under ``OUTPUT_BYTES``."""
        flat = value.detach().reshape(-1)
        if not self._on_host and self.held_bytes + flat.nbytes > OUTPUT_BYTES:
            self._on_host = True
            self._kept = {key: tensor.cpu() for key, tensor in self._kept.items()}
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
        keys = [key for key in self._kept if key[0] not in (_GUIDED, _LATENTS)]
        branches = sorted({name for name, _ in keys}, key=lambda name: (name != "cond", name))
        steps = sorted({step for _, step in keys})
        arrays: dict[str, Any] = {"branches": branches}
        joint = self._halved[0] if self._halved else None
        if branches == [f"{joint}/0", f"{joint}/1"]:
            guidance = self._guidance(branches, steps)
            # Where nothing can be measured, diffusers' usual order: the unconditional half first.
            if guidance is None or guidance >= 0.5:
                branches = branches[::-1]
            arrays = {"branches": ["cond", "uncond"], "joint": joint}
            if guidance is not None:
                arrays["guidance"] = max(guidance, 1 - guidance)
        outputs = self._rows([(branch, step) for branch in branches for step in steps])
        if not outputs or len(steps) <= steps[-1] - steps[0]:
            return {}
        guided = self._rows([(_GUIDED, step) for step in steps])
        for name, rows in (("output", outputs), ("guided", guided)):
            if rows:
                arrays[name] = over_ranks(gram_matrix(rows)).cpu().numpy()
        levels = [sigma(step) for step in (*steps, steps[-1] + 1)]
        arrays |= {"first_step": steps[0], "sigmas": np.array(levels, float)}  # NaN for None
        return {f"{expert}/{name}": np.array(value) for name, value in arrays.items()}

    def _guidance(self, halves: list[str], steps: list[int]) -> float | None:
        """Share g of the second half in the guided prediction, ``(1 - g) first + g second``, median over steps.

        Above 1 the second half is the conditional one, below 0 the first. ``None`` where no step tells.
        """
        shares = []
        for step in steps:
            rows = self._rows([(name, step) for name in (*halves, _GUIDED)])
            products = gram_matrix(rows).cpu().numpy() if rows else np.array(np.nan)
            if not np.isfinite(products).all():
                continue
            if np.linalg.cond(products[:2, :2]) < _WORST_CONDITION:
                first, second = np.linalg.solve(products[:2, :2], products[:2, 2])
                shares += [second / (first + second)] if first + second else []
        return float(np.median(shares)) if shares else None

    def _rows(self, keys: list[_Key]) -> list[Tensor]:
        """What is kept at ``keys``; nothing where one is missing, or they differ in size."""
        rows = [self._kept[key] for key in keys if key in self._kept]
        sizes = {row.numel() for row in rows}
        return rows if len(rows) == len(keys) and len(sizes) == 1 else []
