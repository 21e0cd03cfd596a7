"""The measures agree with scikit-image, an independent implementation, and with errors known in closed form."""

import numpy as np
import pytest

from calibrate.trials import measures as metrics
from calibrate.trials.measures import MetricError

skimage_metrics = pytest.importorskip("skimage.metrics")


def _images(seed, shape=(40, 48, 3), noise=0.1):
    rng = np.random.default_rng(seed)
    reference = rng.random(shape)
    return np.clip(reference + noise * rng.standard_normal(shape), 0, 1), reference


@pytest.mark.parametrize("error_db", [5.0, 16.4, 33.0, 90.0])
def test_psnr_of_a_known_error(error_db):
    error = 10 ** (-error_db / 20)
    reference = np.full((8, 8, 3), 0.25)
    assert metrics.psnr(reference + error, reference, data_range=1.0) == pytest.approx(
        error_db, abs=1e-6
    )
    scaled = metrics.psnr(255 * (reference + error), 255 * reference, data_range=255)
    assert scaled == pytest.approx(error_db, abs=1e-6)


def test_uint8_images_do_not_wrap():
    """Catches `np.mean((a - b) ** 2)` on uint8, which reads a true 16 dB as 28 dB."""
    reference = np.zeros((16, 16, 3), np.uint8)
    candidate = np.full_like(reference, 40)
    expected = 20 * np.log10(255 / 40)
    assert metrics.psnr(candidate, reference, data_range=255) == pytest.approx(expected, abs=1e-6)
    assert metrics.psnr(reference, candidate, data_range=255) == pytest.approx(expected, abs=1e-6)
    wrapped = 10 * np.log10(255**2 / np.mean((reference - candidate) ** 2))
    assert abs(wrapped - expected) > 3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
def test_psnr_and_ssim_agree_with_scikit_image(seed, noise):
    candidate, reference = _images(seed, noise=noise)
    assert metrics.psnr(candidate, reference, data_range=1.0) == pytest.approx(
        skimage_metrics.peak_signal_noise_ratio(reference, candidate, data_range=1.0), abs=1e-9
    )
    expected = skimage_metrics.structural_similarity(
        reference,
        candidate,
        data_range=1.0,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert metrics.ssim(candidate, reference, data_range=1.0) == pytest.approx(expected, abs=1e-10)


def _ms_ssim_by_hand(a, b, data_range, scales):
    """MS-SSIM of one grey plane with explicit convolutions: slow, and shares no code with the module."""
    from scipy.signal import convolve2d

    taps = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(taps, taps) / taps.sum() ** 2
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:scales]
    result = 1.0
    for scale in range(scales):
        mean_a, mean_b = convolve2d(a, window, "valid"), convolve2d(b, window, "valid")
        var_a = convolve2d(a**2, window, "valid") - mean_a**2
        var_b = convolve2d(b**2, window, "valid") - mean_b**2
        cov = convolve2d(a * b, window, "valid") - mean_a * mean_b
        term = (2 * cov + (0.03 * data_range) ** 2) / (var_a + var_b + (0.03 * data_range) ** 2)
        if scale == scales - 1:
            c1 = (0.01 * data_range) ** 2
            term = term * (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
        result *= np.mean(term) ** (weights[scale] / weights.sum())
        a, b = (p[: p.shape[0] // 2 * 2, : p.shape[1] // 2 * 2] for p in (a, b))
        a, b = ((p[::2, ::2] + p[1::2, ::2] + p[::2, 1::2] + p[1::2, 1::2]) / 4 for p in (a, b))
    return result


@pytest.mark.parametrize(("shape", "scales"), [((32, 32), 2), ((45, 64), 3), ((176, 200), 5)])
def test_ms_ssim_agrees_with_explicit_convolutions(shape, scales):
    candidate, reference = _images(3, shape)
    assert metrics.ms_ssim_scales(*shape) == scales
    assert metrics.ms_ssim(candidate, reference, data_range=1.0) == pytest.approx(
        _ms_ssim_by_hand(candidate, reference, 1.0, scales), abs=1e-10
    )


def test_ms_ssim_of_an_inverted_image_is_a_number():
    _, reference = _images(1)
    assert metrics.ms_ssim(1 - reference, reference, data_range=1.0) == 0.0


def test_identical_arrays():
    _, image = _images(0)
    assert metrics.psnr(image, image, data_range=1.0) == np.inf
    assert metrics.ssim(image, image, data_range=1.0) == pytest.approx(1.0)
    assert metrics.ms_ssim(image, image, data_range=1.0) == pytest.approx(1.0)
    assert metrics.latent_rel_l2(image, image) == 0.0


def test_video_measures_are_means_over_frames():
    candidate, reference = _images(2, (3, 24, 24, 3))
    measures = metrics.compare(candidate, reference)
    frames = [metrics.psnr(a, b, data_range=1.0) for a, b in zip(candidate, reference, strict=True)]
    assert measures["psnr_db"] == pytest.approx(np.mean(frames))
    assert measures["psnr_db"] != pytest.approx(
        metrics.psnr(candidate, reference, data_range=1.0), abs=1e-9
    )


def test_audio_measures_of_a_known_gain():
    reference = np.random.default_rng(0).standard_normal((2, 6000))
    measures = metrics.compare(1.1 * reference, reference)
    assert measures["snr_db"] == pytest.approx(20.0)
    assert measures["log_spectral_distance_db"] == pytest.approx(20 * np.log10(1.1), rel=1e-6)


def test_relative_l2_of_a_known_error():
    assert metrics.latent_rel_l2([3.0, 4.0 + 1.0], [3.0, 4.0]) == pytest.approx(0.2)
    assert np.isnan(metrics.latent_rel_l2([1.0], [0.0]))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: metrics.psnr(np.ones((2, 2)), np.ones((2, 3)), data_range=1.0), "shapes differ"),
        (lambda: metrics.psnr(np.ones((2, 2)), np.ones((2, 2)), data_range=0), "data_range"),
        (
            lambda: metrics.ssim(np.ones((8, 8)), np.ones((8, 8)), data_range=1.0),
            "at least 11 pixels",
        ),
        (lambda: metrics.latent_rel_l2([], []), "empty"),
        (lambda: metrics.compare(np.ones(4), np.ones(4)), "expected an image"),
    ],
)
def test_bad_input_is_named(call, text):
    with pytest.raises(MetricError, match=text):
        call()
