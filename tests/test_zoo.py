"""The zoo itself: every denoiser class is in it, runs, is reproducible, and its ground truth is true."""

import functools
import inspect

import pytest
import torch
import zoo
from diffusers.models import transformers
from zoo.uncovered import UNCOVERED

DTYPES = [torch.float32, torch.bfloat16]
NAMES = sorted(zoo.TINY)
TOTAL = 3

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

each = pytest.mark.parametrize("name", NAMES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


@functools.cache
def model_of(name, dtype):
    return zoo.build(name, dtype)


def equal(left, right):
    return len(left) == len(right) and all(
        torch.equal(a, b) for a, b in zip(left, right, strict=True)
    )


def test_every_class_has_a_tiny_model_or_a_reason():
    classes = {name for name, value in vars(transformers).items() if inspect.isclass(value)}
    covered = {tiny.cls for tiny in zoo.TINY.values()}
    assert covered.isdisjoint(UNCOVERED)
    assert covered | set(UNCOVERED) == classes


@each_dtype
@each
def test_runs_are_finite_reproducible_and_move_with_the_step(name, dtype):
    model = model_of(name, dtype)
    first = [zoo.run(model, kwargs) for kwargs in zoo.trajectory(name, TOTAL, dtype=dtype)]
    again = [zoo.run(model, kwargs) for kwargs in zoo.trajectory(name, TOTAL, dtype=dtype)]
    assert all(tensor.isfinite().all() for outputs in first for tensor in outputs)
    assert all(equal(a, b) for a, b in zip(first, again, strict=True))
    assert not equal(first[1], first[2])


@each
def test_a_batch_of_two_runs(name):
    model = model_of(name, torch.float32)
    for kwargs in zoo.trajectory(name, 2, batch=2):
        assert all(tensor.isfinite().all() for tensor in zoo.run(model, kwargs))


@each
def test_no_parameter_is_zero_or_undefined(name):
    for key, parameter in model_of(name, torch.float32).named_parameters():
        assert parameter.isfinite().all() and parameter.any(), key


@each
def test_a_build_depends_on_the_seed_alone(name):
    state = torch.get_rng_state()
    built = zoo.build(name).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.are_deterministic_algorithms_enabled()
    for key, value in model_of(name, torch.float32).state_dict().items():
        assert torch.equal(value, built[key]), key


@each
def test_each_named_block_runs_once_and_in_order(name):
    tiny, model = zoo.TINY[name], model_of(name, torch.float32)
    blocks = {block: path for path in tiny.blocks for block in model.get_submodule(path)}
    called = []
    hooks = [
        block.register_forward_pre_hook(lambda block, args: called.append(block))
        for block in blocks
    ]
    try:
        zoo.run(model, zoo.inputs(name, 0))
    finally:
        for hook in hooks:
            hook.remove()
    busy = [block for i, block in enumerate(blocks) if i not in tiny.idle]
    assert len(called) == len(busy) and set(called) == set(busy)
    assert tuple(dict.fromkeys(blocks[block] for block in called)) == tiny.blocks
    assert len(blocks) >= 3 or "one_block" in name
    for path in tiny.blocks:
        assert [block for block in called if blocks[block] == path] == [
            b for b in busy if blocks[b] == path
        ]


@each
def test_the_time_moves_as_stated(name):
    tiny = zoo.TINY[name]
    times = [kwargs[tiny.time].float().max().item() for kwargs in zoo.trajectory(name, TOTAL)]
    assert times == sorted(times, reverse=not tiny.rises)
    assert len(set(times)) == TOTAL


def test_conditioning_is_fixed_and_latents_drift():
    first, second, third = list(zoo.trajectory("flux"))[:3]
    assert torch.equal(first["encoder_hidden_states"], second["encoder_hidden_states"])
    near, far = (
        (kwargs["hidden_states"] - first["hidden_states"]).norm()
        for kwargs in (second, third)
    )
    assert 0 < near < far


def test_branches_differ_in_the_conditioning_only():
    one, other = zoo.inputs("flux", 1), zoo.inputs("flux", 1, branch=1)
    assert torch.equal(one["hidden_states"], other["hidden_states"])
    assert not torch.equal(one["encoder_hidden_states"], other["encoder_hidden_states"])


def test_steps_in_order_share_a_cache_and_trajectories_do_not():
    first, second = zoo.inputs("flux2_kv", 0), zoo.inputs("flux2_kv", 1)
    assert first["kv_cache"] is second["kv_cache"]
    assert zoo.inputs("flux2_kv", 0)["kv_cache"] is not first["kv_cache"]
    assert (
        next(zoo.trajectory("flux2_kv"))["kv_cache"]
        is not next(zoo.trajectory("flux2_kv"))["kv_cache"]
    )


def test_the_cached_path_computes_what_the_full_one_does():
    """Qwen-Image 2.1's keys of clean tokens do not depend on the step, so both paths agree."""
    model = zoo.build("qwen_image21_kv")
    cached = [
        zoo.run(model, kwargs)[0][:, -16:]
        for kwargs in zoo.trajectory("qwen_image21_kv", TOTAL)
    ]
    full = [
        zoo.run(model, kwargs)[0][:, -16:]
        for kwargs in zoo.trajectory("qwen_image21_edit", TOTAL)
    ]
    for left, right in zip(cached, full, strict=True):
        torch.testing.assert_close(left, right)
