"""Reads digit, ink and paper off a picture, knowing nothing of the model that drew it.

Paper and ink colours are estimated from the pixels and named by the nearest named colour. The digit is read from the
picture's ink coverage by a classifier that was fitted to the real digits.
"""

from dataclasses import dataclass

import numpy as np
from sklearn.base import ClassifierMixin, clone
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

from .data import (
    IMAGE_SIZE,
    INK_RGB,
    PAPER_RGB,
    PLAIN_INK_RGB,
    PLAIN_PAPER_RGB,
    Colouring,
    digit_masks,
)

# Ink may be read as white or black and paper as any ink: a picture can be wrong in any way.
NAMED_RGB = {**INK_RGB, **PAPER_RGB}
READING_SIZE = 16


@dataclass(frozen=True)
class Reading:
    """What a picture shows."""

    digit: int
    ink: str
    paper: str


def nearest_name(colour: np.ndarray) -> str:
    """The named colour with the smallest Euclidean distance in RGB."""
    return min(
        NAMED_RGB,
        key=lambda name: float(np.linalg.norm(colour - np.array(NAMED_RGB[name]))),
    )


def expected_names(colouring: Colouring) -> tuple[str, str]:
    """Names of ink and paper that a picture in this colouring must be read as."""
    if colouring.ink is None or colouring.paper is None:
        return nearest_name(np.array(PLAIN_INK_RGB)), nearest_name(np.array(PLAIN_PAPER_RGB))
    return colouring.ink, colouring.paper


def estimate_colours(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ink and paper colour of an RGB picture in 0..1.

    Paper is the median of the outermost pixel ring, which no digit touches. Ink is the median of the pixels that
    differ from it almost as much as the most different ones do, so that soft edges of strokes do not count.
    """
    ring = np.concatenate([picture[0], picture[-1], picture[1:-1, 0], picture[1:-1, -1]])
    paper = np.median(ring, axis=0)
    pixels = picture.reshape(-1, 3)
    distance = np.linalg.norm(pixels - paper, axis=1)
    ink = np.median(pixels[distance >= 0.8 * np.quantile(distance, 0.98)], axis=0)
    return ink, paper


def ink_coverage(picture: np.ndarray) -> np.ndarray:
    """How far each pixel lies on the way from the paper colour (0) to the ink colour (1)."""
    ink, paper = estimate_colours(picture)
    axis = ink - paper
    return np.clip((picture - paper) @ axis / max(float(axis @ axis), 1e-6), 0, 1)


def features(coverage: np.ndarray) -> np.ndarray:
    """Coverage [N, 32, 32] averaged down to one row of 16x16 values per picture."""
    block = IMAGE_SIZE // READING_SIZE
    return (
        coverage.reshape(-1, READING_SIZE, block, READING_SIZE, block)
        .mean(axis=(2, 4))
        .reshape(len(coverage), -1)
    )


def support_vector_machine() -> ClassifierMixin:
    """The classifier that decides."""
    return SVC(C=10, gamma="scale")


def nearest_neighbours() -> ClassifierMixin:
    """A classifier of another kind, to see whether the first one is merely lenient."""
    return KNeighborsClassifier(n_neighbors=3)


class DigitReader:
    """A classifier fitted to scikit-learn's digits; fitting takes about a second."""

    def __init__(self, classifier: ClassifierMixin | None = None) -> None:
        masks, labels = digit_masks()
        self._features = features(masks[:, 0].numpy())
        self._labels = labels.numpy()
        self._classifier = (classifier or support_vector_machine()).fit(
            self._features, self._labels
        )

    def accuracy_on_real_digits(self) -> float:
        """Cross-validated accuracy: what a perfect model could at most expect to score."""
        return float(
            cross_val_score(
                clone(self._classifier), self._features, self._labels, cv=5
            ).mean()
        )

    def read(self, pictures: np.ndarray) -> list[Reading]:
        """Read RGB pictures [N, 32, 32, 3] in 0..1."""
        coverage = np.stack([ink_coverage(picture) for picture in pictures])
        digits = self._classifier.predict(features(coverage))
        colours = [estimate_colours(picture) for picture in pictures]
        return [
            Reading(int(digit), nearest_name(ink), nearest_name(paper))
            for digit, (ink, paper) in zip(digits, colours, strict=True)
        ]
