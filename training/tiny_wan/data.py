"""Captions and clips: a coloured shape that moves in a straight line over white or black."""

import math
from dataclasses import dataclass

import torch

from training.tiny_longcat_image.data import INK_RGB, PAPER_RGB

FRAME_SIZE = 32
FRAMES = 9
SHAPES = ("circle", "square", "triangle")
COLOURS = tuple(INK_RGB)
BACKGROUNDS = tuple(PAPER_RGB)
# Counter-clockwise in steps of 45 degrees, as seen on the screen.
DIRECTIONS = (
    "right",
    "up and right",
    "up",
    "up and left",
    "left",
    "down and left",
    "down",
    "down and right",
)
RADII = (3.5, 5.0)
SPEEDS = (1.0, 1.6)  # pixels per frame
# Chosen so that shapes of one radius have similar areas; the triangle reaches farthest from its centre.
SQUARE_HALF_SIDE = 0.88
TRIANGLE_INRADIUS = 0.7
REACH = 2 * TRIANGLE_INRADIUS


@dataclass(frozen=True)
class Caption:
    """One prompt of the model and what the clip it asks for must show."""

    shape: str
    colour: str
    direction: str
    background: str

    @property
    def text(self) -> str:
        article = "an" if self.colour[0] in "aeiou" else "a"
        return f"{article} {self.colour} {self.shape} moving {self.direction} on {self.background}"


def all_captions() -> list[Caption]:
    """Every caption, in the order used by the training code."""
    return [
        Caption(shape, colour, direction, background)
        for shape in SHAPES
        for colour in COLOURS
        for direction in DIRECTIONS
        for background in BACKGROUNDS
    ]


def evenly_ordered_captions() -> list[Caption]:
    """Every caption once, in a fixed mixed order of which any first N cover all attributes evenly.

    Each attribute steps round at every caption; its order is turned by one whenever a combination of attributes would
    repeat itself.
    """
    captions = []
    for position in range(len(all_captions())):
        captions.append(
            Caption(
                SHAPES[(position + position // 24) % 3],
                COLOURS[(position + position // 24 // 3) % 6],
                DIRECTIONS[position * 3 % 8],
                BACKGROUNDS[(position + position // 24 // 3 // 2) % 2],
            )
        )
    return captions


def coverage(
    shape: str, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor
) -> torch.Tensor:
    """How much of each pixel a shape around the origin covers, with edges one pixel wide; y points down."""
    if shape == "circle":
        outside = torch.hypot(x, y) - radius
    elif shape == "square":
        outside = torch.maximum(x.abs(), y.abs()) - SQUARE_HALF_SIDE * radius
    else:
        slanted = math.sqrt(3) / 2 * x.abs() - y / 2
        outside = torch.maximum(slanted, y) - TRIANGLE_INRADIUS * radius
    return (0.5 - outside).clamp(0, 1)


def unit_vector(direction: str) -> tuple[float, float]:
    angle = DIRECTIONS.index(direction) * math.pi / 4
    return math.cos(angle), -math.sin(angle)


def uniform(
    low: torch.Tensor | float, high: torch.Tensor | float, count: int
) -> torch.Tensor:
    return low + (high - low) * torch.rand(count)


def render(caption: Caption, count: int, side: int = FRAME_SIZE) -> torch.Tensor:
    """Clips of a caption with random size, speed and start, [N, 3, 9, side, side] in -1..1; nothing leaves the frame.

    Sizes and speeds grow with the frame; edges stay one pixel wide.
    """
    scale = side / FRAME_SIZE
    radius, speed = scale * uniform(*RADII, count), scale * uniform(*SPEEDS, count)
    steps = torch.arange(FRAMES)
    centres = []
    for component in unit_vector(caption.direction):
        path = component * speed
        travelled = path * (FRAMES - 1)
        margin = REACH * radius + 0.5
        low = margin - travelled.clamp(max=0)
        high = side - margin - travelled.clamp(min=0)
        centres.append(uniform(low, high, count)[:, None] + path[:, None] * steps)
    pixels = torch.arange(side) + 0.5
    x = pixels[None, None, None, :] - centres[0][:, :, None, None]
    y = pixels[None, None, :, None] - centres[1][:, :, None, None]
    x, y = torch.broadcast_tensors(x, y)
    covered = coverage(caption.shape, x, y, radius[:, None, None, None])[:, None]
    ink = torch.tensor(INK_RGB[caption.colour]).view(1, 3, 1, 1, 1)
    paper = torch.tensor(PAPER_RGB[caption.background]).view(1, 3, 1, 1, 1)
    return (covered * ink + (1 - covered) * paper) * 2 - 1


def random_clips(count: int, side: int) -> torch.Tensor:
    """One clip each of captions drawn at random."""
    captions = all_captions()
    drawn = torch.randint(len(captions), (count,)).tolist()
    return torch.cat([render(captions[index], 1, side) for index in drawn])
