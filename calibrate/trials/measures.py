"""The table of measures: how near a cached sample is to the uncached one, and how each figure is shown.

Arrays are converted to float64 before anything is subtracted: ``uint8 - uint8`` wraps modulo 256, and a PSNR computed
that way reads 28 dB where 16 dB is true. Images are ``(height, width[, channels])``, videos have frames first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from calibrate.errors import CalibrateError

SSIM_TAPS = 11  # window, sigma and K of Wang et al. 2004
SSIM_SIGMA = 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03
# Noise against silence has no ratio; this is below any limit that somebody sets.
LOWEST_DB = -100.0
HIGHEST_DB = 100.0  # of identical samples where no noise floor was measured
KINDS = {2: "audio", 3: "image", 4: "video"}  # by the number of axes

Array = NDArray[np.float64]


class MetricError(CalibrateError, ValueError):
    """Two arrays that cannot be compared."""


@dataclass(frozen=True)
class Measure:
    """One figure of a sample against its reference.

    Attributes:
        name: Column of the results, and field of an entry's threshold where it has one.
        label: Heading of a table.
        media: What it is computed of: ``image``, ``video``, ``audio`` or ``latents``.
        broken: What a sample with NaN or infinity counts as in a mean.
        text: How it is computed, for a reader who compares figures.
        compute: ``compute(candidate, reference)``; None where it needs weights that the caller loads.
    """

    name: str
    label: str
    unit: str
    higher_is_better: bool
    digits: int
    media: tuple[str, ...]
    broken: float
    text: str
    compute: Callable[[ArrayLike, ArrayLike], float] | None

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return 1 if self.higher_is_better else -1


@dataclass(frozen=True)
class Made:
    """What one generation made.

    Attributes:
        media: Image (height, width, channels) or video (frames first) in [0, 1], or a waveform (channels, samples);
            several where the pipeline makes picture and sound.
        latents: What was handed to the decoder, flat; None where nothing was decoded.
    """

    media: list[np.ndarray]
    latents: np.ndarray | None

    @property
    def is_finite(self) -> bool:
        return all(np.isfinite(array).all() for array in self.media)


def psnr(candidate: ArrayLike, reference: ArrayLike, *, data_range: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB over all elements; infinite for identical arrays."""
    a, b = pair(candidate, reference)
    return _decibels(data_range**2, float(np.mean(np.square(a - b))))


def snr_db(candidate: ArrayLike, reference: ArrayLike) -> float:
    """Signal-to-noise ratio of a waveform or series in dB, the reference as signal; infinite for identical arrays."""
    a, b = pair(candidate, reference)
    return _decibels(float(np.sum(np.square(b))), float(np.sum(np.square(a - b))))


def rel_l2(candidate: ArrayLike, reference: ArrayLike) -> float:
    """Relative L2 error |candidate - reference| / |reference|; NaN for an all-zero reference."""
    a, b = pair(candidate, reference)
    norm = np.linalg.norm(b)
    return float(np.linalg.norm(a - b) / norm) if norm > 0 else float("nan")


def ssim(candidate: ArrayLike, reference: ArrayLike) -> float:
    """Structural similarity (Wang et al. 2004, eq. 13) of images or videos in [0, 1]; 1 for identical ones."""
    a, b = pair(candidate, reference)
    if a.ndim == 2:
        a, b = a[..., None], b[..., None]
    if a.ndim not in (3, 4) or min(a.shape[-3:-1]) < SSIM_TAPS:
        raise MetricError(
            f"found an array of shape {np.shape(candidate)}; SSIM needs (height, width[, channels]) "
            f"with both sides at least {SSIM_TAPS} pixels"
        )
    if a.ndim == 4:
        return float(np.mean([ssim(*frames) for frames in zip(a, b, strict=True)]))
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    contrast = (2 * (_blur(a * b) - mean_a * mean_b) + c2) / (var_a + var_b + c2)
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return float(np.mean(contrast * luminance))


def _ssim_where_it_fits(candidate: ArrayLike, reference: ArrayLike) -> float:
    fits = min(np.shape(reference)[-3:-1]) >= SSIM_TAPS
    return ssim(candidate, reference) if fits else float("nan")


# The order is that of tables; the first of these in dB that a run has is its main measure.
_TABLE = (
    Measure("psnr_db", "PSNR", "dB", True, 1, ("image", "video"), 0.0,
            "PSNR over all pixels, channels and frames, in [0, 1]", psnr),
    Measure("snr_db", "SNR", "dB", True, 1, ("audio",), 0.0,
            "signal-to-noise ratio over all samples, the uncached ones as signal", snr_db),
    Measure("ssim", "SSIM", "", True, 3, ("image", "video"), 0.0,
            f"SSIM of Wang et al. 2004: Gaussian window, {SSIM_TAPS} taps, sigma {SSIM_SIGMA}, "
            f"K = {SSIM_K1} and {SSIM_K2}, per channel, interior pixels, then averaged, over frames too",
            _ssim_where_it_fits),
    Measure("rel_l2", "relative error", "", False, 3, ("audio",), 1.0,
            "|cached - uncached| / |uncached| (L2) over all samples", rel_l2),
    Measure("lpips", "LPIPS", "", False, 3, ("image", "video"), 1.0,
            "LPIPS v0.1, AlexNet, images scaled to [-1, 1]; video: mean over frames", None),
    Measure("latent_rel_l2", "latent error", "", False, 3, ("latents",), 1.0,
            "|cached - uncached| / |uncached| (L2) of the latents handed to the decoder", rel_l2),
)  # fmt: skip
MEASURES = {measure.name: measure for measure in _TABLE}


def compare(
    candidate: ArrayLike, reference: ArrayLike, kind: str | None = None
) -> dict[str, float]:
    """Every measure that fits the medium, by name; without ``kind`` the number of axes tells it."""
    kind = kind or KINDS.get(np.ndim(reference))
    if kind is None:
        raise MetricError(
            f"found a sample of shape {np.shape(reference)}; expected an image, a video or a waveform"
        )
    figures = {
        measure.name: measure.compute(candidate, reference)
        for measure in _TABLE
        if kind in measure.media and measure.compute is not None
    }
    return {name: value for name, value in figures.items() if not np.isnan(value)}


def compare_all(
    cached: Made,
    uncached: Made,
    lpips: Callable[[ArrayLike, ArrayLike], float] | None = None,
) -> dict[str, float]:
    """Every measure of media and latents, dB at most ``HIGHEST_DB``."""
    figures: dict[str, float] = {}
    for ours, theirs in zip(cached.media, uncached.media, strict=True):
        figures |= compare(ours, theirs)
        if lpips is not None and theirs.ndim >= 3:
            figures["lpips"] = lpips(ours, theirs)
    latents, reference = cached.latents, uncached.latents
    if latents is not None and reference is not None and latents.shape == reference.shape:
        figures |= compare(latents, reference, "latents")
    in_db = [name for name in figures if MEASURES[name].unit == "dB"]
    return figures | {name: min(figures[name], HIGHEST_DB) for name in in_db}


def measured(results: pd.DataFrame) -> list[Measure]:
    """The measures that a table of results has figures of, in the table's order."""
    return [m for m in _TABLE if m.name in results and results[m.name].notna().any()]


def main_measure(results: pd.DataFrame) -> str:
    """PSNR for images and video, SNR for sound and series."""
    return next((m.name for m in measured(results) if m.unit == "dB"), "psnr_db")


def capped(results: pd.DataFrame, measure: str) -> pd.Series:
    """The measure's column with every sample in it: broken ones count as those in which nothing is left.

    Identical samples, whose dB older results leave out, have ``HIGHEST_DB``; newer ones have the noise floor.
    """
    known = MEASURES[measure]
    values = results[measure].astype(float).mask(results["broken"].astype(bool), known.broken)
    if known.unit != "dB":
        return values
    identical = results["identical"].fillna(False).astype(bool)
    return values.mask(values.isna() & identical, HIGHEST_DB).clip(upper=HIGHEST_DB)


def pair(candidate: ArrayLike, reference: ArrayLike) -> tuple[Array, Array]:
    """Both in float64: unsigned integers would wrap. They have to be of one shape."""
    a, b = np.asarray(candidate, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if a.shape != b.shape:
        raise MetricError(
            f"shapes differ: {a.shape} against {b.shape}; compare samples of one protocol"
        )
    if a.size == 0:
        raise MetricError("nothing to compare: the arrays are empty")
    return a, b


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return float("inf")
    return max(float(10 * np.log10(signal / noise)), LOWEST_DB) if signal > 0 else LOWEST_DB


def _blur(plane: Array) -> Array:
    """Gaussian window over (height, width), cropped to the pixels whose whole window lies inside the image."""
    radius = SSIM_TAPS // 2
    blurred = ndimage.gaussian_filter(plane, SSIM_SIGMA, radius=radius, axes=(0, 1))
    return blurred[radius:-radius, radius:-radius]
