"""Distances between an uncached and a cached sample, in floating point, with the data range always stated.

Arrays are converted to float64 before anything is subtracted: ``uint8 - uint8`` wraps modulo 256, and a PSNR computed
that way reads 28 dB where 16 dB is true. Images are ``(height, width)`` or ``(height, width, channels)``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from calibrate.errors import CalibrateError

SSIM_TAPS = 11
SSIM_SIGMA = 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
VARIANTS = {
    "psnr_db": "PSNR over all pixels and channels; video: mean over frames",
    "ssim": f"SSIM of Wang et al. 2004: Gaussian window, {SSIM_TAPS} taps, sigma {SSIM_SIGMA}, K = {SSIM_K1} and "
    f"{SSIM_K2}, per channel, interior pixels, then averaged; video: mean over frames",
    "ms_ssim": "MS-SSIM of Wang et al. 2003 with the same window; as many of its 5 scales as the window fits into, "
    "weights renormalised; video: mean over frames",
    "latent_rel_l2": "|cached - uncached| / |uncached| (L2) of the latents handed to the decoder",
    "snr_db": "signal-to-noise ratio of the waveform, the uncached one as signal",
    "log_spectral_distance_db": "log-spectral distance: RMS over frequency, mean over frames (Hann, 2048, hop 512)",
}


class MetricError(CalibrateError, ValueError):
    """Two arrays that cannot be compared."""


def _pair(
    candidate: ArrayLike, reference: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    # Converted before any arithmetic, whatever the dtype: unsigned integers would wrap.
    a, b = np.asarray(candidate, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if a.shape != b.shape:
        raise MetricError(
            f"shapes differ: {a.shape} against {b.shape}; compare samples of one protocol"
        )
    if a.size == 0:
        raise MetricError("nothing to compare: the arrays are empty")
    return a, b


def _check_range(data_range: float) -> None:
    if not (np.isfinite(data_range) and data_range > 0):
        raise MetricError(
            f"data_range is {data_range!r}; give the full span of the values, e.g. 1.0 or 255"
        )


def latent_rel_l2(candidate: ArrayLike, reference: ArrayLike) -> float:
    """Relative L2 error |candidate - reference| / |reference| over all elements (NaN for an all-zero reference)."""
    a, b = _pair(candidate, reference)
    norm = np.linalg.norm(b)
    return float(np.linalg.norm(a - b) / norm) if norm > 0 else float("nan")


def psnr(candidate: ArrayLike, reference: ArrayLike, *, data_range: float) -> float:
    """Peak signal-to-noise ratio, 10 log10(data_range^2 / MSE), in dB; infinite for identical arrays."""
    _check_range(data_range)
    a, b = _pair(candidate, reference)
    mse = float(np.mean(np.square(a - b)))
    if mse == 0:
        return float("inf")
    return float(20 * np.log10(data_range) - 10 * np.log10(mse))


def _blur(plane: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian window over (height, width), cropped to the pixels whose whole window lies inside the image."""
    radius = SSIM_TAPS // 2
    blurred = ndimage.gaussian_filter(plane, SSIM_SIGMA, radius=radius, axes=(0, 1))
    return blurred[radius:-radius, radius:-radius]


def _ssim_maps(
    a: NDArray[np.float64], b: NDArray[np.float64], data_range: float
) -> tuple[NDArray, NDArray]:
    """The SSIM map and its contrast-structure part, shape (height - 10, width - 10, channels)."""
    c1, c2 = (SSIM_K1 * data_range) ** 2, (SSIM_K2 * data_range) ** 2
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    contrast = (2 * (_blur(a * b) - mean_a * mean_b) + c2) / (var_a + var_b + c2)
    return contrast * (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1), contrast


def _images(
    candidate: ArrayLike, reference: ArrayLike, data_range: float
) -> tuple[NDArray, NDArray]:
    _check_range(data_range)
    a, b = _pair(candidate, reference)
    if a.ndim == 2:
        a, b = a[..., None], b[..., None]
    if a.ndim != 3 or min(a.shape[:2]) < SSIM_TAPS:
        raise MetricError(
            f"found an array of shape {np.shape(candidate)}; SSIM needs (height, width[, channels]) "
            f"with both sides at least {SSIM_TAPS} pixels"
        )
    return a, b


def ssim(candidate: ArrayLike, reference: ArrayLike, *, data_range: float) -> float:
    """Structural similarity (Wang et al. 2004, equation 13), see ``VARIANTS['ssim']``; 1 for identical images."""
    a, b = _images(candidate, reference, data_range)
    return float(np.mean(_ssim_maps(a, b, data_range)[0]))


def ms_ssim_scales(height: int, width: int) -> int:
    """How many of the five scales an image of this size allows (a 32 x 32 image: 2)."""
    side, scales = min(height, width), 0
    while side >= SSIM_TAPS and scales < len(MS_SSIM_WEIGHTS):
        side, scales = side // 2, scales + 1
    return scales


def _halve(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of each 2 x 2 cell; an odd last row or column is dropped."""
    height, width = image.shape[0] // 2 * 2, image.shape[1] // 2 * 2
    cells = image[:height, :width].reshape(height // 2, 2, width // 2, 2, -1)
    return cells.mean(axis=(1, 3))


def ms_ssim(candidate: ArrayLike, reference: ArrayLike, *, data_range: float) -> float:
    """Multi-scale SSIM (Wang et al. 2003), see ``VARIANTS['ms_ssim']``.

    Small images use fewer scales (``ms_ssim_scales``), so figures of different image sizes do not compare. A negative
    mean contrast, which has no real power, counts as 0.
    """
    a, b = _images(candidate, reference, data_range)
    scales = ms_ssim_scales(*a.shape[:2])
    weights = np.array(MS_SSIM_WEIGHTS[:scales]) / sum(MS_SSIM_WEIGHTS[:scales])
    product = np.ones(a.shape[2])
    for scale, weight in enumerate(weights):
        full, contrast = _ssim_maps(a, b, data_range)
        term = (full if scale == scales - 1 else contrast).mean(axis=(0, 1))
        product *= np.maximum(term, 0) ** weight
        a, b = _halve(a), _halve(b)
    return float(product.mean())


def frame_mean(
    metric: Callable[..., float], candidate: ArrayLike, reference: ArrayLike, **options: float
) -> float:
    """Mean of an image metric over the frames of two videos of shape (frames, height, width, channels)."""
    a, b = _pair(candidate, reference)
    return float(np.mean([metric(x, y, **options) for x, y in zip(a, b, strict=True)]))


def snr_db(candidate: ArrayLike, reference: ArrayLike) -> float:
    """Signal-to-noise ratio of a waveform (..., samples) in dB; infinite for identical arrays."""
    a, b = _pair(candidate, reference)
    noise, signal = float(np.sum(np.square(a - b))), float(np.sum(np.square(b)))
    if noise == 0:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal > 0 else float("-inf")


def log_spectral_distance_db(
    candidate: ArrayLike,
    reference: ArrayLike,
    *,
    window: int = 2048,
    hop: int = 512,
    floor_db: float = -100.0,
) -> float:
    """Log-spectral distance of two waveforms (..., samples) in dB: RMS over frequencies, then mean over frames.

    Powers are floored ``floor_db`` below the reference's largest bin, so that silence against numerical noise does
    not dominate. A waveform shorter than the window is one frame.
    """
    a, b = _pair(candidate, reference)
    taps = min(window, b.shape[-1])
    shape = np.hanning(taps)

    def power(signal: NDArray[np.float64]) -> NDArray[np.float64]:
        frames = np.lib.stride_tricks.sliding_window_view(signal, taps, axis=-1)[..., ::hop, :]
        return np.square(np.abs(np.fft.rfft(frames * shape, axis=-1)))

    power_a, power_b = power(a), power(b)
    floor = max(float(power_b.max()), np.finfo(float).tiny) * 10 ** (floor_db / 10)
    difference = 10 * np.log10(np.maximum(power_a, floor) / np.maximum(power_b, floor))
    return float(np.mean(np.sqrt(np.mean(np.square(difference), axis=-1))))


def media_kind(array: ArrayLike) -> str:
    """One of "image" (height, width, channels), "video" (frames first) and "audio" (channels, samples)."""
    shape = np.shape(array)
    kind = {2: "audio", 3: "image", 4: "video"}.get(len(shape))
    if kind is None:
        raise MetricError(
            f"found a sample of shape {shape}; expected an image, a video or a waveform"
        )
    return kind


def compare(
    candidate: ArrayLike, reference: ArrayLike, *, data_range: float = 1.0
) -> dict[str, float]:
    """Every measure that fits the medium; the kind is told by the number of axes, see ``media_kind``."""
    kind = media_kind(reference)
    if kind == "audio":
        return {
            "snr_db": snr_db(candidate, reference),
            "log_spectral_distance_db": log_spectral_distance_db(candidate, reference),
        }
    measures: dict[str, Callable[..., float]] = {"psnr_db": psnr, "ssim": ssim, "ms_ssim": ms_ssim}
    if min(np.shape(reference)[-3:-1]) < SSIM_TAPS:
        measures = {"psnr_db": psnr}
    if kind == "video":
        return {
            name: frame_mean(f, candidate, reference, data_range=data_range)
            for name, f in measures.items()
        }
    return {name: f(candidate, reference, data_range=data_range) for name, f in measures.items()}
