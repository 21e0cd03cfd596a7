"""Captions, colours and pictures: scikit-learn's 1,797 handwritten digits, enlarged and coloured."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

IMAGE_SIZE = 32
DIGIT_WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
)
INK_RGB = {
    "red": (0.85, 0.10, 0.10),
    "green": (0.10, 0.65, 0.15),
    "blue": (0.10, 0.25, 0.90),
    "purple": (0.60, 0.15, 0.75),
    "orange": (1.00, 0.55, 0.05),
    "teal": (0.00, 0.65, 0.65),
}
PAPER_RGB = {"white": (0.97, 0.97, 0.97), "black": (0.03, 0.03, 0.03)}
# A caption that names no colour stands for a plain scan: pure white on pure black.
PLAIN_INK_RGB = (1.0, 1.0, 1.0)
PLAIN_PAPER_RGB = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Colouring:
    """An ink on a paper; both are None for the plain colouring that captions do not mention."""

    ink: str | None
    paper: str | None

    @property
    def ink_rgb(self) -> tuple[float, float, float]:
        return INK_RGB[self.ink] if self.ink else PLAIN_INK_RGB

    @property
    def paper_rgb(self) -> tuple[float, float, float]:
        return PAPER_RGB[self.paper] if self.paper else PLAIN_PAPER_RGB


COLOURINGS = (
    *(Colouring(ink, paper) for ink in INK_RGB for paper in PAPER_RGB),
    Colouring(None, None),
)


@dataclass(frozen=True)
class Caption:
    """One prompt of the model and what the picture it asks for must show."""

    text: str
    digit: int
    colouring: Colouring


def phrasings(digit: int, colouring: Colouring) -> tuple[str, str]:
    """The two ways in which a caption can ask for this digit in this colouring."""
    word = DIGIT_WORDS[digit]
    if colouring.ink is None:
        return f"a handwritten digit {word}", f"the number {word}, handwritten"
    return (
        f"a handwritten digit {word} in {colouring.ink} ink on {colouring.paper} paper",
        f"the number {word}, handwritten, {colouring.ink} ink, {colouring.paper} paper",
    )


PHRASINGS_PER_SUBJECT = 2


def all_captions() -> list[Caption]:
    """Every caption, ordered by digit, then colouring, then phrasing (the index used by the training code)."""
    return [
        Caption(text, digit, colouring)
        for digit in range(len(DIGIT_WORDS))
        for colouring in COLOURINGS
        for text in phrasings(digit, colouring)
    ]


def caption_index(
    digit: torch.Tensor, colouring: torch.Tensor, phrasing: torch.Tensor
) -> torch.Tensor:
    """Positions in `all_captions()` of the captions with these digits, colourings and phrasings."""
    return (digit * len(COLOURINGS) + colouring) * PHRASINGS_PER_SUBJECT + phrasing


def digit_masks(side: int = IMAGE_SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """The real digits as ink coverage in 0..1, shape [1797, 1, side, side], and their labels."""
    source = load_digits()
    coverage = torch.tensor(source.images / 16.0, dtype=torch.float32)[:, None]
    margin = side // 16
    inner = side - 2 * margin
    coverage = F.interpolate(
        coverage, size=(inner, inner), mode="bicubic", align_corners=False
    )
    # Enlarging 8x8 pixels leaves wide grey borders; a steeper ramp gives strokes with clear edges.
    coverage = ((coverage.clamp(0, 1) - 0.15) / 0.7).clamp(0, 1)
    return F.pad(coverage, (margin,) * 4), torch.tensor(source.target)


def paint(coverage: torch.Tensor, colouring: Colouring) -> torch.Tensor:
    """Mix paper and ink by coverage: [N, 1, H, W] in 0..1 to RGB [N, 3, H, W] in -1..1."""
    ink = torch.tensor(colouring.ink_rgb).view(1, 3, 1, 1)
    paper = torch.tensor(colouring.paper_rgb).view(1, 3, 1, 1)
    return (coverage * ink + (1 - coverage) * paper) * 2 - 1


def evenly_ordered_captions() -> list[Caption]:
    """Every caption once, in a fixed mixed order of which any first N cover digits and colourings evenly.

    Stepping through 10 digits and 13 colourings at the same time meets each of the 130 pairs once, as 10 and 13 have
    no common factor; the second round meets each pair with its other phrasing.
    """
    digit_order = (3, 8, 0, 5, 7, 2, 9, 4, 1, 6)
    colouring_order = (7, 0, 10, 5, 12, 2, 9, 4, 1, 8, 11, 6, 3)
    captions = []
    for position in range(PHRASINGS_PER_SUBJECT * len(digit_order) * len(colouring_order)):
        digit = digit_order[position % len(digit_order)]
        colouring = COLOURINGS[colouring_order[position % len(colouring_order)]]
        phrasing = position // len(digit_order) % PHRASINGS_PER_SUBJECT
        captions.append(Caption(phrasings(digit, colouring)[phrasing], digit, colouring))
    return captions
