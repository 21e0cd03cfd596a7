"""Guidance in one call: both branches are halves of the batch, and the log keeps them apart."""

import numpy as np
import pytest
import tiny_pipelines
import torch

from calibrate.recording.inner_products import Products
from calibrate.recording.recorder import Recorder
from calibrate.runs.gram_log import guided
from runtime import denoisers


def recorded(case):
    """One generation: the Gram log, and both halves of everything that the denoiser returned."""
    halves = []

    def keep(module, args, output):
        value = output[0] if isinstance(output, tuple) else output.sample
        halves.append([half.double().flatten() for half in value.chunk(2)])

    handle = case.transformer.register_forward_hook(keep)
    with (
        torch.inference_mode(),
        Recorder(denoisers(case.pipe), case.pipe, gram=True) as recorder,
    ):
        recorder.start()
        latents = case.run()
        found = recorder.finish().gram
    handle.remove()
    return {key.partition("/")[2]: value for key, value in found.items()}, halves, latents


def test_halves_of_the_batch_are_the_guidance_branches():
    """Bug: errors of both halves added up, where the image sees their guided combination."""
    case = tiny_pipelines.sd3()
    found, halves, _ = recorded(case)
    assert (
        list(found["branches"]) == ["cond", "uncond"]
        and str(found["joint"]) == case.branches[0]
    )
    scale = case.arguments["guidance_scale"]
    assert float(found["guidance"]) == pytest.approx(scale, rel=1e-5)
    uncond, cond = (torch.stack(rows) for rows in zip(*halves, strict=True))
    rows = torch.cat([cond, uncond])
    np.testing.assert_allclose(found["output"], (rows @ rows.T).numpy(), rtol=1e-10)
    velocity = uncond + scale * (cond - uncond)
    np.testing.assert_allclose(
        guided(found["output"], ["cond", "uncond"], scale),
        (velocity @ velocity.T).numpy(),
        rtol=1e-8,
    )


def test_recording_does_not_change_what_is_generated():
    case = tiny_pipelines.sd3()
    assert torch.equal(recorded(case)[2], case.run())


def generated(order, guidance, steps=6, seed=0):
    """The arrays of an Euler generation whose denoiser returns its halves in this order."""
    random, kept = torch.Generator().manual_seed(seed), Products()
    latents = torch.randn(1, 8, 4, generator=random)
    for step in range(steps):
        kept.add_latents("branch0", torch.cat([latents, latents]))
        cond, uncond = torch.randn(2, 1, 8, 4, generator=random)
        kept.add_output(
            "branch0",
            step,
            torch.cat([cond, uncond] if order == "cond first" else [uncond, cond]),
        )
        rescaled = 0.5 * (uncond + guidance * (cond - uncond))  # as some do
        kept.add_step(step, rescaled, latents)
    return kept.matrices("transformer"), cond


@pytest.mark.parametrize("order", ["cond first", "uncond first"])
def test_which_half_is_conditional_is_measured(order):
    """Bug: a pipeline that has the conditional half first was planned with the guidance upside down."""
    found, cond = generated(order, 3.5)
    assert float(found["transformer/guidance"]) == pytest.approx(3.5, rel=1e-4)
    assert found["transformer/output"][5, 5] == pytest.approx(
        float(cond.double().square().sum()), rel=1e-6
    )


def test_a_batch_of_different_latents_is_one_branch():
    kept = Products()
    for step in range(3):
        kept.add_latents("branch0", torch.randn(2, 8, 4))
        kept.add_output("branch0", step, torch.randn(2, 8, 4))
    found = kept.matrices("transformer")
    assert list(found["transformer/branches"]) == ["branch0"] and found[
        "transformer/output"
    ].shape == (3, 3)
    assert "transformer/joint" not in found
