"""How often the host waits for the device, what a refused apply leaves alone, and generations of several schedules.

On a GPU every number that Python reads from a tensor makes the host wait. Here the reads are counted where Python asks
for them, and those of the plain pipeline are subtracted. Where there must be none, models run on the meta device: its
tensors hold nothing to read.
"""

from collections import Counter

import pytest
import tiny_pipelines
import torch
import zoo
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.overrides import TorchFunctionMode

import coeffs
from calibrate.recording.recorder import Recorder
from calibrate.runs.pairs import load_run
from runtime import ApplyError, Forecast, InvalidSetting, apply_tea_cache, denoisers
from runtime.watch.places import mapped

torch.set_num_threads(1)
STEPS = 6
PLAN = "CCSCSS"
KINDS = (
    "reuse",
    "linear",
    "quadratic",
    Forecast("fitted", {2: (1.5, -0.5), 4: (1.4, -0.4), 5: (1.2,)}),
)
CALL = {
    "height": 16,
    "width": 16,
    "num_inference_steps": STEPS,
    "guidance_scale": 4.5,
    "output_type": "latent",
}


class Reads(TorchFunctionMode):
    """Counts what brings a tensor's values to the host."""

    NAMES = frozenset(
        {"tolist", "item", "__float__", "__int__", "__bool__", "cpu", "numpy", "__index__"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.NAMES:
            self.found[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipelines.longcat_image().pipe


def generate(pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(
        "a handwritten digit seven",
        enable_prompt_rewrite=False,
        generator=generator,
        **CALL,
    ).images


def reads(pipe) -> int:
    with Reads() as counted:
        generate(pipe)
    return counted.found.total()


@pytest.fixture(scope="module")
def plain(pipe) -> int:
    return reads(pipe)


@pytest.mark.slow
def test_a_plan_never_waits_and_a_gate_once_per_step(pipe, plain):
    with apply_tea_cache(pipe, schedule="C" * STEPS):
        assert reads(pipe) == plain
    with apply_tea_cache(pipe, schedule="C" * STEPS, forecast="linear"):
        assert reads(pipe) - plain <= 1  # the noise levels, once per generation
    with apply_tea_cache(pipe, coefficients=[1.0, 0.0], threshold=0.0):
        assert reads(pipe) == plain
    # Cond and uncond decide together, and neither the first nor the last step asks: one read for each other step.
    with apply_tea_cache(pipe, coefficients=[1.0, 0.0], threshold=1e-9):
        assert reads(pipe) - plain == STEPS - 2
    with apply_tea_cache(pipe, coefficients=[1.0, 0.0], threshold=1e-9, branches="apart"):
        assert reads(pipe) - plain == 2 * (STEPS - 2)


@pytest.mark.parametrize("of", ["residual", "output"])
@pytest.mark.parametrize("kind", KINDS, ids=("reuse", "linear", "quadratic", "fitted"))
def test_a_plan_with_a_forecast_never_waits(pipe, plain, kind, of):
    """But for the noise levels, once per generation, where a forecast asks for them."""
    levels = kind in ("linear", "quadratic")
    with apply_tea_cache(pipe, schedule=PLAN, forecast=kind, forecast_of=of) as cache:
        assert reads(pipe) - plain == levels
        assert cache.stats.pattern == PLAN


def test_a_plan_reads_its_own_noise_levels_once(pipe, plain):
    """To compare them with the scheduler's and to extrapolate in them, by one and the same read."""
    sigmas = tuple(pipe.scheduler.sigmas.tolist())[:STEPS]
    plan = coeffs.Plan(schedule=PLAN, forecast="linear", forecast_of="output", sigmas=sigmas)
    with apply_tea_cache(pipe, schedule=plan) as cache:
        assert reads(pipe) - plain == 1
        assert cache.stats.pattern == PLAN and not cache.mismatches


@pytest.mark.parametrize("of", ["residual", "output"])
@pytest.mark.parametrize("kind", KINDS, ids=("reuse", "linear", "quadratic", "fitted"))
@pytest.mark.parametrize("name", ["flux", "wan21", "qwen_image"])
def test_a_plan_runs_where_nothing_can_be_read(name, kind, of):
    target = Unreadable(name)
    with apply_tea_cache(target, schedule=PLAN, forecast=kind, forecast_of=of) as cache:
        target.generate()
    assert cache.stats.pattern == PLAN


class Unreadable:
    """A denoiser on the meta device, with a scheduler whose count it advances itself."""

    def __init__(self, name: str) -> None:
        self._name, self._model = name, zoo.build(name).to("meta")
        self.scheduler = FlowMatchEulerDiscreteScheduler()

    @property
    def components(self) -> dict:
        return {"transformer": self._model, "scheduler": self.scheduler}

    def generate(self) -> None:
        self.scheduler.set_timesteps(STEPS)
        for step, kwargs in enumerate(zoo.trajectory(self._name, total=STEPS)):
            self.scheduler._step_index = step
            zoo.run(self._model, mapped(kwargs, lambda tensor: tensor.to("meta")))


def test_the_recorder_reads_once_a_generation_is_over(pipe, plain):
    with Recorder(denoisers(pipe), pipe) as recorder:
        recorder.start()
        assert reads(pipe) - plain <= 1  # the noise levels
        assert len(recorder.finish().rows) == 2 * (STEPS - 1)


def test_what_the_recorder_holds_does_not_grow_with_the_steps():
    """Of each trajectory the signal, the stack's input and output (three of its hidden size), and the small output."""
    model, held = zoo.build("wan21"), []
    for total in (4, 12):
        with Recorder({"transformer": model}) as recorder:
            recorder.start()
            for kwargs in zoo.trajectory("wan21", total=total):
                output = zoo.run(model, kwargs)[0]
            held.append(recorder.held_bytes())
    hidden = 4 * 2 * 4 * 4 * 24  # float32, frames x height x width of the tokens, channels
    assert held[0] == held[1]
    assert 3 * hidden <= held[0] - output.nbytes < 4 * hidden


def test_a_refused_apply_leaves_the_applied_one_alone(pipe):
    with apply_tea_cache(pipe, schedule="CS" * (STEPS // 2)) as cache:
        with pytest.raises(ApplyError, match="already carries"):
            apply_tea_cache(pipe, schedule="C" * STEPS)
        generate(pipe)
        assert cache.stats.pattern == "CS" * (STEPS // 2)
        assert "maybe_free_model_hooks" in vars(pipe)
    assert "maybe_free_model_hooks" not in vars(pipe)
    other = apply_tea_cache(pipe, schedule="C" * STEPS)
    cache.remove()  # once more, late
    assert "maybe_free_model_hooks" in vars(pipe)
    other.remove()


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "CS", "max_skips": 1},
        {"schedule": "CS", "compat": True},
        {"schedule": "CS", "strict": True},
        {"schedule": "CS", "domain": (0.0, 1.0)},
        {
            "coefficients": [1.0, 0.0],
            "threshold": 0.1,
            "compat": True,
            "start": 2,
            "num_steps": 8,
        },
        {
            "coefficients": [1.0, 0.0],
            "threshold": 0.1,
            "compat": True,
            "max_skips": 2,
            "num_steps": 8,
        },
    ],
    ids=str,
)
def test_settings_that_would_do_nothing_are_refused(settings):
    with pytest.raises(InvalidSetting, match="no meaning beside"):
        apply_tea_cache(zoo.build("flux"), **settings)


def test_a_pipelines_scheduler_tells_the_number_of_steps(pipe):
    with pytest.raises(InvalidSetting, match="bare denoiser"):
        apply_tea_cache(pipe, schedule="CS", num_steps=2)


@pytest.mark.parametrize("of", ["residual", "output"])
def test_gradients_may_be_on(of):
    """Caching is for inference, but a loop without ``no_grad`` must not break it, nor be kept alive by it."""
    model = zoo.build("flux")
    with apply_tea_cache(model, schedule="CCSC", forecast="linear", forecast_of=of) as cache:
        for kwargs in zoo.trajectory("flux", total=4):
            model(**kwargs)
        kept = next(iter(cache._watch.stacks[0].trajectories.values())).anchors
        values = [value for left in kept.values() for value in left.values()]
        assert values and not any(value.requires_grad for value in values)


def test_two_schedules_in_one_generation_are_counted_on(pipe):
    """Chunked video and two-stage pipelines: one trajectory, no pair between the schedules, and a log that loads."""
    with Recorder(denoisers(pipe), pipe) as recorder:
        recorder.start()
        generate(pipe)
        once = len(recorder.finish().rows)
        recorder.start()
        generate(pipe)
        generate(pipe)
        rows = recorder.finish().rows
    assert len(rows) == 2 * once
    steps = [row["step"] for row in rows if row["branch"] == "cond"]
    assert steps == [*range(1, STEPS), *range(STEPS + 1, 2 * STEPS)]
    import pandas as pd

    run = load_run(pd.DataFrame(rows).assign(prompt_id="one", seed=0))
    assert len(run.frame) == len(rows)
