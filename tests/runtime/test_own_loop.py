"""A sampling loop of the caller's own: its scheduler is read as a pipeline's is."""

import pytest
import torch
from torch import nn

from calibrate.recording.recorder import Recorder
from runtime import InvalidSetting, OwnLoop, apply_tea_cache, denoisers

STEPS = 6


class Denoiser(nn.Module):
    """Two layers of torch's own transformer, its stack named by hand or found."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, batch_first=True)
        self.layers = nn.ModuleList(
            [layer, nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)]
        )
        self.head = nn.Linear(8, 8)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        hidden = sample + timestep.reshape(-1, 1, 1)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


class Scheduler:
    """Noise levels from 1 to 0, Euler's method."""

    def start(self) -> None:
        self.timesteps = torch.linspace(1, 1 / STEPS, STEPS)
        self.sigmas = torch.linspace(1, 0, STEPS + 1)
        self.step_index = 0

    def step(self, prediction: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        now, following = self.sigmas[self.step_index : self.step_index + 2]
        self.step_index += 1
        return sample + (following - now) * prediction


@pytest.fixture
def own():
    torch.manual_seed(0)
    return OwnLoop(Denoiser().eval(), Scheduler())


@torch.inference_mode()
def generate(loop: OwnLoop, seed: int = 0) -> torch.Tensor:
    loop.scheduler.start()
    sample = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(seed))
    for timestep in loop.scheduler.timesteps:
        sample = loop.scheduler.step(loop.modules["transformer"](sample, timestep), sample)
    return sample


def test_its_steps_and_noise_levels_are_recorded(own):
    with torch.inference_mode(), Recorder(own.modules, own) as recorder:
        recorder.start()
        generate(own)
        rows = recorder.finish().rows
    assert [row["sigma"] for row in rows] == pytest.approx(
        own.scheduler.sigmas[1:-1].tolist()
    )
    assert {row["num_steps"] for row in rows} == {STEPS}


def test_the_scheduler_tells_how_many_steps_there_are(own):
    plain = generate(own)
    with apply_tea_cache(own, coefficients=[1.0, 0.0], threshold=1e9) as cache:
        for _ in range(2):  # the second generation begins with the scheduler's new timesteps
            assert not torch.equal(generate(own), plain)
    # The last step of both is known to be the last one, and computed.
    assert cache.stats.branches["transformer", "branch0"].pattern == "CSSSSC"
    assert torch.equal(generate(own), plain)
    with pytest.raises(InvalidSetting, match="num_steps= is for a bare denoiser"):
        apply_tea_cache(own, schedule="CS", num_steps=STEPS)


def test_without_a_scheduler_it_is_a_bare_denoiser(own):
    loop = OwnLoop({"first": own.modules["transformer"]}, blocks=["layers"])
    assert list(denoisers(loop)) == ["first"]
    with apply_tea_cache(loop, schedule="CSCSCC", num_steps=STEPS) as cache:
        generate(own)
    assert cache.stats.branches["first", "branch0"].pattern == "CSCSCC"
