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
    assert metrics.psnr(candidate, reference, data_range=255) == pytest.approx(
        expected, abs=1e-6
    )
    assert metrics.psnr(reference, candidate, data_range=255) == pytest.approx(
        expected, abs=1e-6
    )
    wrapped = 10 * np.log10(255**2 / np.mean((reference - candidate) ** 2))
    assert abs(wrapped - expected) > 3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
def test_psnr_and_ssim_agree_with_scikit_image(seed, noise):
    candidate, reference = _images(seed, noise=noise)
    assert metrics.psnr(candidate, reference, data_range=1.0) == pytest.approx(
        skimage_metrics.peak_signal_noise_ratio(reference, candidate, data_range=1.0),
        abs=1e-9,
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
    assert metrics.ssim(candidate, reference) == pytest.approx(expected, abs=1e-10)


def test_identical_arrays():
    _, image = _images(0)
    assert metrics.psnr(image, image, data_range=1.0) == np.inf
    assert metrics.ssim(image, image) == pytest.approx(1.0)
    assert metrics.rel_l2(image, image) == 0.0


def test_video_measures_are_over_all_frames():
    candidate, reference = _images(2, (3, 24, 24, 3))
    measures = metrics.compare(candidate, reference)
    error = np.mean((candidate - reference) ** 2)
    assert measures["psnr_db"] == pytest.approx(-10 * np.log10(error))
    frames = [metrics.ssim(a, b) for a, b in zip(candidate, reference, strict=True)]
    assert measures["ssim"] == pytest.approx(np.mean(frames))


def test_a_video_of_noise_whose_first_frame_is_kept_is_not_perfect():
    """Bug: one identical frame made the mean over frames infinite, which counted as a perfect result."""
    rng = np.random.default_rng(0)
    noise, reference = rng.random((2, 5, 16, 16, 3))
    noise[0] = reference[0]
    assert metrics.compare(noise, reference)["psnr_db"] < 10


def test_noise_against_a_silent_reference_is_below_any_limit():
    """Bug: a ratio of minus infinity was kept as missing, and missing counted as perfect."""
    noise = np.random.default_rng(0).standard_normal((1, 500))
    assert metrics.compare(noise, np.zeros((1, 500)))["snr_db"] == metrics.LOWEST_DB


def test_audio_measures_of_a_known_gain():
    reference = np.random.default_rng(0).standard_normal((2, 6000))
    figures = metrics.compare(1.1 * reference, reference)
    assert figures == {"snr_db": pytest.approx(20.0), "rel_l2": pytest.approx(0.1)}


def test_small_images_have_no_ssim():
    assert set(metrics.compare(np.zeros((8, 8, 3)), np.ones((8, 8, 3)))) == {"psnr_db"}


def test_relative_l2_of_a_known_error():
    assert metrics.rel_l2([3.0, 4.0 + 1.0], [3.0, 4.0]) == pytest.approx(0.2)
    assert np.isnan(metrics.rel_l2([1.0], [0.0]))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: metrics.psnr(np.ones((2, 2)), np.ones((2, 3)), data_range=1.0),
            "shapes differ",
        ),
        (
            lambda: metrics.ssim(np.ones((8, 8)), np.ones((8, 8))),
            "at least 11 pixels",
        ),
        (lambda: metrics.rel_l2([], []), "empty"),
        (lambda: metrics.compare(np.ones(4), np.ones(4)), "expected an image"),
    ],
)
def test_bad_input_is_named(call, text):
    with pytest.raises(MetricError, match=text):
        call()
