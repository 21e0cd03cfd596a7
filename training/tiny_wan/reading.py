"""Reads shape, colour, background and direction off a clip, knowing nothing of the model that drew it.

Colours are estimated from the pixels and named by the nearest named colour. The direction is that of the line through
the centres of the coloured area over the frames; the shape is the one whose outline of the same area fits best.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from training.tiny_longcat_image.reading import estimate_colours, nearest_name

from .data import (
    DIRECTIONS,
    FRAME_SIZE,
    SHAPES,
    SQUARE_HALF_SIDE,
    TRIANGLE_INRADIUS,
    coverage,
)

# Less movement than this from first to last frame, in pixels, is none.
LEAST_TRAVEL = 3.0
AREA_OF_UNIT_RADIUS = {
    "circle": math.pi,
    "square": (2 * SQUARE_HALF_SIDE) ** 2,
    "triangle": 3 * math.sqrt(3) * TRIANGLE_INRADIUS**2,
}


@dataclass(frozen=True)
class Reading:
    """What a clip shows; the direction is None if nothing moves."""

    shape: str
    colour: str
    direction: str | None
    background: str


def shape_coverage(
    frame: np.ndarray, colour: np.ndarray, background: np.ndarray
) -> np.ndarray:
    """How far each pixel lies on the way from the background colour (0) to the shape's (1)."""
    axis = colour - background
    return np.clip((frame - background) @ axis / max(float(axis @ axis), 1e-6), 0, 1)


def centre(covered: np.ndarray) -> tuple[float, float]:
    """Centre of the covered area in pixels, (x, y); faint pixels do not count."""
    weight = np.where(covered > 0.3, covered, 0)
    pixels = np.arange(FRAME_SIZE) + 0.5
    total = max(float(weight.sum()), 1e-6)
    return float(weight.sum(0) @ pixels / total), float(weight.sum(1) @ pixels / total)


def read_direction(centres: np.ndarray) -> str | None:
    """The named direction nearest to the straight line through the centres [frame, x and y]."""
    frames = np.arange(len(centres))
    dx, dy = np.polyfit(frames, centres, 1)[0] * (len(centres) - 1)
    if math.hypot(dx, dy) < LEAST_TRAVEL:
        return None
    return DIRECTIONS[round(math.atan2(-dy, dx) / (math.pi / 4)) % len(DIRECTIONS)]


def misfit(shape: str, covered: np.ndarray, middle: tuple[float, float]) -> float:
    """Mean difference to the named shape of the same area around the same centre."""
    radius = math.sqrt(float(covered.sum()) / AREA_OF_UNIT_RADIUS[shape])
    pixels = torch.arange(FRAME_SIZE) + 0.5
    y, x = torch.meshgrid(pixels - middle[1], pixels - middle[0], indexing="ij")
    return float(np.abs(coverage(shape, x, y, torch.tensor(radius)).numpy() - covered).mean())


def read_clip(clip: np.ndarray) -> Reading:
    """Read a clip [9, 32, 32, 3] in 0..1."""
    colours = [estimate_colours(frame) for frame in clip]
    colour, background = (
        np.median([pair[index] for pair in colours], axis=0) for index in (0, 1)
    )
    covered = [shape_coverage(frame, colour, background) for frame in clip]
    centres = [centre(frame) for frame in covered]
    misfits = {
        shape: sum(
            misfit(shape, frame, middle)
            for frame, middle in zip(covered, centres, strict=True)
        )
        for shape in SHAPES
    }
    return Reading(
        shape=min(misfits, key=misfits.__getitem__),
        colour=nearest_name(colour),
        direction=read_direction(np.array(centres)),
        background=nearest_name(background),
    )
