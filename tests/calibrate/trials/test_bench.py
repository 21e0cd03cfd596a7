"""What a run is measured against: the noise floor, and what counts as identical or broken."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_pipeline import TinyPipeline, tiny_session

from calibrate.model.prompts import load_prompts
from calibrate.trials.bench import Bench, Reference
from calibrate.trials.measures import compare
from calibrate.trials.sampler import Sample, Sampler

PROMPT = load_prompts(["x"]).prompts[0]
IMAGE = np.random.default_rng(0).random((16, 16, 3))
FLOOR = {"psnr_db": 40.0, "ssim": 0.99}


@pytest.fixture
def bench():
    """Only what measuring needs."""
    made = Bench.__new__(Bench)
    made._perceptual = None
    return made


def measured(bench, media, reference=IMAGE):
    sample = Sample([np.asarray(media, np.float32)], None, 1.0)
    kept = Reference([np.asarray(reference, np.float32)], None, pd.DataFrame(), FLOOR)
    return bench._measure(sample, kept)


def test_decibels_are_capped_at_the_noise_floor_and_identical_is_at_it(bench):
    """Bug: identical samples counted as 100 dB, where two uncached runs that differ in a bit are 51 dB apart."""
    same, near = measured(bench, IMAGE), measured(bench, IMAGE + 1e-4)
    assert same["identical"] and not near["identical"]
    assert (
        same["psnr_db"] == near["psnr_db"] == 40.0 and same["at_floor"] and near["at_floor"]
    )
    far = measured(bench, IMAGE + 0.1)
    assert far["psnr_db"] == pytest.approx(20, abs=1e-3) and not far["at_floor"]


def test_a_sample_with_nan_is_broken(bench):
    broken = np.array(IMAGE)
    broken[0, 0, 0] = np.nan
    assert measured(bench, broken) == {
        "identical": False,
        "broken": True,
        "at_floor": False,
    }


def test_a_run_perturbed_in_the_last_place_is_near_and_leaves_nothing_behind():
    pipe = TinyPipeline()
    sampler = Sampler(tiny_session(pipe))
    plain, perturbed, after = (sampler(PROMPT, perturbed=on) for on in (False, True, False))
    floor = compare(perturbed.media[0], plain.media[0])["psnr_db"]
    assert 90 < floor < 200  # float32, eight steps
    np.testing.assert_array_equal(plain.media[0], after.media[0])
    assert not pipe.transformer._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_perturbation_is_one_unit_in_the_last_place(dtype):
    from calibrate.trials.sampler import _last_place_noise

    seen = []

    class Denoiser(torch.nn.Module):
        def forward(self, latents, timestep=None):
            seen.append(latents)

    values = torch.linspace(-3, 3, 600, dtype=dtype).reshape(2, 300)
    module = Denoiser()
    with _last_place_noise({"transformer": module}):
        module(values, timestep=torch.ones(1))
        module(latents=values)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for moved in seen:
        assert moved.dtype == dtype
        apart = (moved.view(bits).int() - values.view(bits).int()).abs()
        # At a power of two the unit below is half of that above.
        assert apart.max() <= 2 and (apart == 1).float().mean() > 0.9


class OneSetting:
    """A bench whose runs take no time, and whose measuring is watched."""

    def __init__(self, tmp_path, device):
        self.bench = Bench.__new__(Bench)
        self.bench.__dict__ |= {
            "case": SimpleNamespace(num_steps=8, identity={"device": device}),
            "prompts": load_prompts(["a", "b", "c"]), "_perceptual": None,
            "_lock": None, "progress": False, "folder": tmp_path, "_identity": "x",
        }  # fmt: skip
        self.ran, self.measured = [], []
        self.bench._has_reference = lambda prompt: True
        self.bench.reference = lambda prompt: None
        self.bench._run = self._run

    def _run(self, setting, prompt):
        self.ran.append(prompt.prompt)
        row = {"policy": setting.policy, "prompt": prompt.prompt, "broken": False}
        return row, SimpleNamespace(is_drawable=False)

    def results(self, measure):
        from calibrate.trials.setting import plan_setting

        self.bench._measure = measure
        return self.bench.results([plan_setting("plan", "CSCSCSCS")])[0]


def test_measuring_does_not_hold_up_the_model_on_a_gpu(tmp_path):
    """Bug: measures of 5 s an image were taken on the host between the runs."""
    import threading

    watched, all_ran = OneSetting(tmp_path, "cuda"), threading.Event()

    def measure(sample, reference):
        assert all_ran.wait(10), "the next run waited for the measures of the last"
        return {"psnr_db": 40.0}

    inner = watched._run
    watched.bench._run = lambda *args, **more: (
        inner(*args, **more),
        all_ran.set() if len(watched.ran) == 3 else None,
    )[0]
    frame = watched.results(measure)
    assert list(frame["prompt"]) == ["a", "b", "c"] and set(frame["psnr_db"]) == {40.0}
    assert len((tmp_path / "results.jsonl").read_text().split()) > 3


def test_on_the_cpu_measuring_never_runs_beside_a_timed_run(tmp_path):
    watched = OneSetting(tmp_path, "cpu")
    order = watched.ran
    watched.results(lambda sample, reference: order.append("measured") or {"psnr_db": 40.0})
    assert order == ["a", "measured", "b", "measured", "c", "measured"]
