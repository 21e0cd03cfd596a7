"""The Gram log of the guided prediction: what the scheduler receives, whoever made it."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_pipeline import TinyExperts, TinyPipeline

from calibrate.recording.recorder import Recorder
from runtime import denoisers

STEPS = 6


def recorded(pipe, run):
    """The Gram log of one generation and, by other means, everything that the scheduler received."""
    received, own = [], pipe.scheduler.step

    def step(model_output, *args, **kwargs):
        received.append(model_output.double().flatten())
        return own(model_output, *args, **kwargs)

    with torch.inference_mode():
        pipe.scheduler.step = step
        expected = run()
        del pipe.scheduler.step
        before = type(pipe.scheduler), dict(pipe.scheduler.__dict__)
        with Recorder(denoisers(pipe), pipe, gram=True) as recorder:
            recorder.start()
            result = run()
            gram = recorder.finish().gram
    assert type(pipe.scheduler) is before[0] and "step" not in pipe.scheduler.__dict__
    assert (torch.as_tensor(expected) == torch.as_tensor(result)).all()
    return gram, torch.stack(received)


@pytest.mark.parametrize("name", tiny_pipelines.CASES)
def test_every_pipeline_logs_what_its_scheduler_receives(name):
    case = tiny_pipelines.CASES[name]()
    gram, rows = recorded(case.pipe, case.run)
    first = 0
    for expert in case.experts:
        if f"{expert}/output" not in gram:
            assert name == "lumina2"  # its branches lack steps
            return
        steps = len(gram[f"{expert}/sigmas"]) - 1
        own = rows[first : first + steps]
        np.testing.assert_allclose(gram[f"{expert}/guided"], (own @ own.T).numpy(), rtol=1e-9)
        first += steps
    assert first == len(rows) == case.evaluations


def test_a_step_that_passes_all_its_arguments_on_is_heard():
    class PassesOn(FlowMatchEulerDiscreteScheduler):
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    pipe = TinyPipeline()
    pipe.scheduler = PassesOn.from_config(pipe.scheduler.config)
    gram, rows = recorded(
        pipe,
        lambda: pipe("a fish", STEPS, generator=torch.Generator().manual_seed(0)).images,
    )
    guided = gram["transformer/guided"]
    np.testing.assert_allclose(guided, (rows @ rows.T).numpy(), rtol=1e-9)


def test_hooks_come_off_where_a_scheduler_cannot_be_heard():
    class WithUnheard(TinyPipeline):
        @property
        def components(self):
            return super().components | {"other": SimpleNamespace(set_timesteps=None)}

    pipe = WithUnheard()
    own = type(pipe.scheduler)
    with (
        pytest.raises(AttributeError, match="step"),
        Recorder(denoisers(pipe), pipe, gram=True),
    ):
        pass
    assert type(pipe.scheduler) is own
    assert not any(module._forward_pre_hooks for module in pipe.transformer.modules())


def test_experts_log_their_own_steps():
    pipe = TinyExperts()
    gram, rows = recorded(
        pipe,
        lambda: pipe("a fish", STEPS, generator=torch.Generator().manual_seed(0)).images,
    )
    first = gram["transformer/guided"].shape[0]
    assert first + gram["transformer_2/guided"].shape[0] == STEPS
    np.testing.assert_allclose(
        gram["transformer_2/guided"], (rows[first:] @ rows[first:].T).numpy(), rtol=1e-9
    )


def test_the_first_experts_buffers_are_freed_at_the_handover():
    """Bug: they were held until the end, 9 GiB for Wan 2.2."""
    pipe = TinyExperts()
    held = []

    def look(module, args, output):
        held.append(
            [
                sum(len(part.buffers) for part in stack.trajectories.values())
                for stack in recorder._watch.stacks
            ]
        )

    for module in denoisers(pipe).values():
        module.register_forward_hook(look)
    with torch.inference_mode(), Recorder(denoisers(pipe), pipe) as recorder:
        recorder.start()
        pipe("a fish", STEPS, generator=torch.Generator().manual_seed(0))
        rows = recorder.finish().rows
    both = [(bool(first), bool(second)) for first, second in held]
    assert both[-1] == (False, True) and both.count((True, True)) <= 2 + 2
    steps = {
        row["expert"]: sum(other["expert"] == row["expert"] for other in rows) for row in rows
    }
    assert sum(steps.values()) == 2 * (STEPS - 2)


def test_what_a_copy_of_the_scheduler_receives_is_part_of_the_step():
    """Pipelines with picture and sound step a copy of their scheduler for the second of them."""

    class WithSound(TinyPipeline):
        def __call__(self, *args, **kwargs):
            own, sound = self.scheduler, copy.deepcopy(self.scheduler)
            sound.set_timesteps(STEPS)
            latents = torch.zeros(3)

            class Both:
                def __getattr__(self, name):
                    return getattr(own, name)

                def step(self, value, time, sample, **options):
                    sound.step(value.flatten()[:3], time, latents, **options)
                    return own.step(value, time, sample, **options)

            self.scheduler = Both()
            try:
                return super().__call__(*args, **kwargs)
            finally:
                self.scheduler = own

    pipe = WithSound()
    with torch.inference_mode(), Recorder(denoisers(pipe), pipe, gram=True) as recorder:
        recorder.start()
        pipe("a fish", STEPS, generator=torch.Generator().manual_seed(0))
        with_sound = recorder.finish().gram["transformer/guided"]
    pipe = TinyPipeline()
    _, rows = recorded(
        pipe,
        lambda: pipe("a fish", STEPS, generator=torch.Generator().manual_seed(0)).images,
    )
    rows = torch.cat([rows[:, :3], rows], dim=1)
    np.testing.assert_allclose(with_sound, (rows @ rows.T).numpy(), rtol=1e-9)


def test_without_a_scheduler_there_is_no_guided_prediction():
    pipe = TinyPipeline()
    with torch.inference_mode(), Recorder(denoisers(pipe), gram=True) as recorder:
        recorder.start()
        pipe("a fish", STEPS, generator=torch.Generator().manual_seed(0))
        gram = recorder.finish().gram
    assert "transformer/output" in gram and "transformer/guided" not in gram
