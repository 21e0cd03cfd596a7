"""The Gram log of a run: inner products of all steps of each trajectory, read and combined. No tensors, no model.

``gram/<group>.npz`` holds, for each expert (``transformer``):

========================  =============================================================================================
``<expert>/branches``     names of the guidance branches, the conditional one first
``<expert>/first_step``   0, or where in the schedule this expert of several begins
``<expert>/sigmas``       noise level of its T steps and after the last; NaN where the scheduler tells none
``<expert>/output``       inner products of the denoiser's outputs, shape (B T, B T), float64: row b T + t is step t of
                          branch b, so that the cross terms of the branches are in it
``<expert>/guided``       where the pipeline steps a scheduler: inner products of what its ``step`` received, (T, T)
``<expert>/joint``        name that the branches have in the pairs, where one call holds both as halves of its batch
``<expert>/guidance``     guidance scale measured there: along which combination of the halves the latents moved
========================  =============================================================================================

With guidance g the sampler follows ``g cond + (1 - g) uncond``, and the Gram matrix of that follows from the blocks. A
pipeline that rescales the guided prediction (LongCat-Image's guidance renormalisation) is described up to that scale.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrate.errors import RunFolderError, one_line
from calibrate.model.protocol import AnyPath
from calibrate.runs.folder import RunFolder

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]
Arrays = dict[str, Any]  # of one expert, by name
# Of a re-planned schedule: how far interpolated outputs may lie from real ones, relative to one step's change.
LARGEST_INTERPOLATION_ERROR = 0.1
SECOND_GUIDANCE = "guidance_scale_2"  # of pipelines with two experts (Wan 2.2)


class NoPlan(RunFolderError, ValueError):
    """A log from which nothing can be planned; says why and what to do."""


@dataclass(frozen=True)
class GramLog:
    """What planning needs of a run.

    Attributes:
        output: Gram matrices of the guided outputs, shape (samples, T, T).
        sigmas: Noise levels, shape (T + 1,); NaN where unknown.
        guided: Gram matrices of what the scheduler's ``step`` received, or ``None`` where none was seen.
        first_step: Where in the schedule this expert takes over; 0 for the only one.
    """

    output: Array
    sigmas: Array
    guided: Array | None = None
    expert: str = "transformer"
    first_step: int = 0

    @property
    def num_steps(self) -> int:
        return self.output.shape[1]

    @property
    def levels(self) -> Array:
        """Abscissa of forecasts, as in the runtime: the noise level, or minus the step where there is none."""
        return levels_of(self.sigmas)

    @property
    def increments(self) -> Array:
        """What each step's output is multiplied with: the step in sigma, or 1 where sigmas are unknown."""
        known = np.isfinite(self.sigmas).all()
        return np.diff(self.sigmas) if known else np.ones(self.num_steps)


def load_grams(source: AnyPath) -> list[GramLog]:
    """Read the Gram log of a run: one per expert, in the order in which they take over the schedule.

    Raises:
        NoPlan: No Gram log, groups that do not belong together, or experts that do not follow on each other.
        RunFolderError: Not a run.
    """
    run = RunFolder.open(source)
    names = {group.name for group in run.groups} & run.with_gram()
    files = [run.path / "gram" / f"{name}.npz" for name in sorted(names)]
    if not files:
        command = run.manifest.get("command") or "calibrate record"
        raise NoPlan(
            f"{run.path}: recorded without Gram matrices; this adds them and leaves its pairs as they are: "
            f"{command} --gram --out {run.path}"
        )
    lacking = len(run.finished() - run.with_gram())
    if lacking:
        logger.warning(
            "%s: %d prompts have no Gram matrices and are left out", run.path, lacking
        )
    samples = list(map(read_gram, files))
    for path, sample in zip(files, samples, strict=True):
        if _form(sample) != _form(samples[0]):
            raise NoPlan(
                f"{path}: other branches or another number of steps than {files[0].name}"
            )
    samples = list(filter(_finite, samples))
    if not samples:
        raise NoPlan(f"{run.path}: no Gram matrix is finite; the model made NaN or infinity")
    protocol = run.manifest.get("protocol") or {}
    scale = protocol.get("guidance_scale")
    logs: list[GramLog] = []
    first, begin = samples[0], 0
    for expert in sorted(first, key=lambda name: first[name]["first_step"]):
        log = _log_of(expert, [sample[expert] for sample in samples], scale)
        if log.first_step != begin:
            raise NoPlan(
                f"{run.path}: {expert} begins at step {log.first_step}, expected {begin}; a plan needs experts that "
                "follow on each other"
            )
        begin += log.num_steps
        logs.append(log)
        # As the pipelines do: the later expert has a guidance of its own where the call gives one.
        scale = (protocol.get("call_arguments") or {}).get(SECOND_GUIDANCE) or scale
    return logs


def _log_of(expert: str, parts: list[Arrays], scale: float | None) -> GramLog:
    """One expert's log from its arrays of all samples."""
    first = parts[0]
    branches = first["branches"].tolist()
    if scale is None and all("guidance" in part for part in parts):
        scale = float(np.median([part["guidance"] for part in parts]))
    watched = all("guided" in part for part in parts)
    return GramLog(
        output=np.stack([guided(part["output"], branches, scale) for part in parts]),
        sigmas=np.asarray(first["sigmas"], float),
        guided=np.stack([part["guided"] for part in parts]) if watched else None,
        expert=expert,
        first_step=int(first["first_step"]),
    )


def _form(sample: dict[str, Arrays]) -> dict[str, tuple]:
    """What all samples of a run must have in common."""
    return {
        expert: (part["branches"].tolist(), part["output"].shape, int(part["first_step"]))
        for expert, part in sample.items()
    }


def _finite(sample: dict[str, Arrays]) -> bool:
    return all(
        np.isfinite(part[name]).all()
        for part in sample.values()
        for name in {"output", "guided"} & part.keys()
    )


def guided(gram: Array, branches: list[str], guidance_scale: float | None) -> Array:
    """Gram matrix of the guided prediction, shape (T, T), from that of the branches, shape (B T, B T).

    Two branches ``cond`` and ``uncond`` are combined as ``g cond + (1 - g) uncond``. Other branches are taken as
    independent: their squared errors add up.
    """
    count = len(branches)
    steps = len(gram) // count
    blocks = np.asarray(gram, float).reshape(count, steps, count, steps)
    if {*branches} == {"cond", "uncond"} and guidance_scale is not None:
        factors = [
            guidance_scale if name == "cond" else 1 - guidance_scale for name in branches
        ]
        return np.einsum("a,atbu,b->tu", factors, blocks, factors)
    return np.einsum("atau->tu", blocks)


def levels_of(sigmas: Array) -> Array:
    """Abscissa of forecasts over T steps, from their noise levels and the end's: those, or minus the step."""
    levels = np.asarray(sigmas, float)[:-1]
    return levels if np.isfinite(levels).all() else -np.arange(len(levels), dtype=float)


def at_steps(log: GramLog, num_steps: int) -> GramLog:
    """The log as a schedule of another length would have given it, by interpolation of the outputs in sigma.

    The new noise levels follow the recorded schedule, read at fractions of its length. Interpolation is linear, so
    that the new Gram matrix is ``A G A'``.

    Raises:
        NoPlan: More steps than were recorded, unknown sigmas, or outputs too curved to be interpolated.
    """
    steps = log.num_steps
    if num_steps == steps:
        return log
    asked = f"{num_steps} steps from a log of {steps}"
    if not 3 <= num_steps <= steps:
        raise NoPlan(f"{asked}: expected 3 to {steps}; record more steps")
    if not np.isfinite(log.sigmas).all():
        raise NoPlan(f"{asked}: no sigmas in it; record {num_steps} steps")
    error = interpolation_error(log)
    if error > LARGEST_INTERPOLATION_ERROR:
        raise NoPlan(
            f"{asked}: outputs are not smooth enough in sigma (interpolated steps are off by {error:.2g} of a step's "
            f"change, at most {LARGEST_INTERPOLATION_ERROR}); record {num_steps} steps"
        )
    # The last recorded level belongs to step T-1; beyond it lies the end, where nothing is computed.
    places = np.linspace(0, steps - 1, num_steps)
    # Each row holds the shares of the two recorded steps around a new one.
    matrix = np.maximum(1 - np.abs(places[:, None] - np.arange(steps)), 0)
    return replace(
        log,
        output=matrix @ log.output @ matrix.T,
        guided=None if log.guided is None else matrix @ log.guided @ matrix.T,
        sigmas=np.append(matrix @ log.sigmas[:steps], log.sigmas[-1]),
    )


def interpolation_error(log: GramLog) -> float:
    """How far a step's output lies from the line between its neighbours, relative to the change of one step (median).

    Interpolating half a step from two recorded ones is off by about a quarter of that.
    """
    ratios = []
    for step in range(1, log.num_steps - 1):
        nearby = slice(step - 1, step + 2)
        before, level, after = log.levels[nearby]
        weight = (level - after) / (before - after)
        line, change = np.array([-weight, 1.0, weight - 1]), np.array([-1.0, 1.0, 0.0])
        block = log.output[:, nearby, nearby]
        off, moved = (np.einsum("i,pij,j->p", v, block, v).clip(0) for v in (line, change))
        ratios.append(np.sqrt(off / np.maximum(moved, 1e-300)))
    return float(np.median(ratios)) / 4 if ratios else 0.0


def read_gram(path: Path) -> dict[str, Arrays]:
    """``expert -> name -> array``. Raises RunFolderError for a damaged file."""
    experts: dict[str, Arrays] = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for key in arrays.files:
                expert, _, name = key.partition("/")
                experts.setdefault(expert, {"first_step": 0})[name] = arrays[key]
    except Exception as error:  # zipfile and zlib have errors of their own
        raise RunFolderError(
            f"{path}: not a readable Gram log ({one_line(error)}); remove it and record anew"
        ) from None
    return experts
