"""A model of one's own from recording to verification: a callable, its denoiser, its scheduler, and series."""

import shutil
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

import coeffs
from calibrate import fit, plan, record, report, verify
from calibrate.errors import CalibrateError
from calibrate.reporting.run_data import load_findings
from calibrate.reporting.run_plots import series_grid
from calibrate.trials.setting import GATE, PLAN
from runtime import OwnLoop, apply_tea_cache

pytestmark = pytest.mark.slow

STEPS = 8
PROMPTS = [f"a day of kind {index}" for index in range(9)]


class Denoiser(nn.Module):
    """Two layers of torch's own transformer over a series of 12 values."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, batch_first=True)
        self.embed = nn.Linear(2, 8)
        self.stack = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        time = timestep.expand_as(sample)
        hidden = self.embed(torch.stack([sample, time], dim=-1))
        return self.head(self.stack(hidden)).squeeze(-1)


class Scheduler:
    """Noise levels from 1 to 0, Euler's method."""

    def set_timesteps(self, num_steps: int) -> None:
        self.sigmas = torch.linspace(1, 0, num_steps + 1)
        self.timesteps = self.sigmas[:-1].clone()
        self.step_index = 0

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
    ) -> tuple[torch.Tensor]:
        now, following = self.sigmas[self.step_index : self.step_index + 2]
        self.step_index += 1
        return (sample + (following - now) * model_output,)


@pytest.fixture(scope="module")
def own():
    torch.manual_seed(0)
    return OwnLoop(Denoiser().eval(), Scheduler())


def generator(loop):
    @torch.inference_mode()
    def generate(
        prompt: str, seed: int, num_steps: int = STEPS, scheduler=None
    ) -> np.ndarray:
        scheduler = scheduler or loop.scheduler
        scheduler.set_timesteps(num_steps)
        random = torch.Generator().manual_seed(1000 * seed + len(prompt) + ord(prompt[-1]))
        sample = torch.randn(1, 12, generator=random)
        for timestep in scheduler.timesteps:
            prediction = loop.modules["transformer"](sample, timestep)
            (sample,) = scheduler.step(prediction, timestep, sample)
        return sample.numpy()

    return generate


@pytest.fixture(scope="module")
def run(own, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "run"
    record(
        "own-series",
        generate=generator(own),
        modules=own,
        prompts=PROMPTS[:4],
        steps=STEPS,
        gram=True,
        out=folder,
        progress=False,
    )
    coeffs.save(fit(folder), folder / "entry.yaml")
    return folder


def test_the_schedulers_name_and_the_dtype_are_in_the_protocol(run):
    protocol = coeffs.load(run / "entry.yaml").protocol
    assert (protocol.scheduler, protocol.num_steps, protocol.dtype) == (
        "Scheduler",
        STEPS,
        "float32",
    )


def test_it_is_planned_and_verified_by_the_noise_in_its_series(own, run):
    options = {"generate": generator(own), "modules": own, "progress": False}
    plan(
        run,
        computed=[5],
        prompts=PROMPTS[4:7],
        num_prompts=2,
        choosing=1,
        candidates=1,
        **options,
    )
    policies = ["gate", "plan", "uniform", "fewer-steps", "fewer-steps-2"]
    found = verify(run, prompts=PROMPTS[7:], budgets=[5], policies=policies, **options)
    rows = found.results
    assert {GATE, "plan", "uniform skipping", "fewer steps"} >= set(rows["policy"])
    assert {"plan", "uniform skipping", "fewer steps"} <= set(rows["policy"])
    assert "second-order" in str(found.facts["refused"])
    assert set(found.facts["measures"]) == {"snr_db", "rel_l2"}
    assert np.allclose(rows["snr_db"], -20 * np.log10(rows["rel_l2"]))
    assert (rows.loc[rows["policy"] == "fewer steps", "computed_steps"] == 5).all()
    entry = coeffs.load(run / "entry.yaml")
    assert entry.plans
    assert list((run / "trajectories").glob("*/fit-*.json")), (
        "weights are fitted where it runs"
    )
    verified = [row for row in entry.thresholds if row.kind == "verified"]
    assert [row.snr_db for row in verified] == pytest.approx(
        found.summary.loc[found.summary["policy"] == GATE, "snr_db"].tolist()
    )


def test_budcache_searches_by_real_runs_of_a_recorded_prompt(own, run, tmp_path):
    """Of the 21 schedules that compute the first and two other steps none comes nearer on that prompt."""
    generate = generator(own)
    options = {"generate": generate, "modules": own, "progress": False}
    copy = shutil.copytree(run, tmp_path / "run")
    prompts = PROMPTS[7:]
    verification = verify(
        copy, prompts=prompts, budgets=[3], policies=["budcache"], **options
    )
    rows = verification.results.query('policy == "BudCache\'s search"')
    (found,) = {pattern for patterns in rows["patterns"] for pattern in patterns.values()}
    uncached = generate(PROMPTS[0], 0)

    def error(schedule: str) -> float:
        with apply_tea_cache(own, schedule=schedule):
            return float(np.linalg.norm(generate(PROMPTS[0], 0) - uncached))

    pairs = combinations(range(1, STEPS), 2)
    possible = [
        "".join("C" if s in (0, *pair) else "S" for s in range(STEPS)) for pair in pairs
    ]
    assert len(possible) == 21 and error(found) == pytest.approx(min(map(error, possible)))


def test_the_report_draws_the_series(run):
    findings = load_findings(run)
    samples = findings.samples(PLAN)
    assert samples and samples[0].uncached.shape == samples[0].cached.shape == (1, 12)
    assert len(series_grid(samples).get_lines()) == 2 * len(samples)
    page = report(run).read_text(encoding="utf-8")
    assert "SNR against uncached" in page
    assert (run / "report" / "samples.png").stat().st_size > 1000


def test_a_plan_is_applied_by_the_loop(own, run):
    generate = generator(own)
    plain = generate(PROMPTS[0], 0)
    schedule = coeffs.load(run / "entry.yaml").plans[0]
    with apply_tea_cache(own, schedule=schedule) as cache:
        skipped = generate(PROMPTS[0], 0)
    assert cache.stats.branches["transformer", "branch0"].pattern == schedule.schedule
    assert not np.array_equal(skipped, plain)
    assert np.array_equal(generate(PROMPTS[0], 0), plain)


def test_without_num_steps_fewer_steps_are_refused_with_what_to_do(own, run):
    whole = generator(own)
    found = verify(
        run,
        generate=lambda prompt, seed: whole(prompt, seed),
        modules=own.modules["transformer"],
        prompts=PROMPTS[7:8],
        budgets=[5],
        policies=["uniform", "fewer-steps"],
        progress=False,
    )
    assert "takes no num_steps" in found.facts["refused"]["fewer steps"]
    assert "uniform skipping" in set(found.results["policy"])


def test_a_generate_that_returns_nothing_cannot_be_verified(own, run):
    with pytest.raises(CalibrateError, match="an array of a generate"):
        verify(
            run,
            generate=lambda prompt, seed, num_steps=STEPS: None,
            modules=own,
            prompts=PROMPTS[7:8],
            policies=["uniform"],
            progress=False,
        )
