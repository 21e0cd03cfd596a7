"""Trajectories that planning may read, those that it has to run anew, and prompts that it leaves out."""

import functools
import shutil

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_pipeline import TinyPipeline

import coeffs
from calibrate.errors import CorruptShard
from calibrate.fitting.draft import fit
from calibrate.planning.trajectories import NoSolver, Runner, load_trajectories
from calibrate.recording.record import record
from calibrate.runs.pairs import load_run
from calibrate.trials.case import open_case

TEXTS = ["a fish", "a bird"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run"
    record(TinyPipeline(), prompts=TEXTS, steps=4, out=path, progress=False)
    coeffs.save(fit(load_run(path), degree=1), path / "entry.yaml")
    return path


@pytest.fixture
def run(recorded, tmp_path):
    return shutil.copytree(recorded, tmp_path / "run")


def loaded(run, pipeline=None):
    case = open_case(run, model=pipeline or TinyPipeline())
    said = []
    runner = Runner(case, False, said.append)
    return runner, load_trajectories(runner), said


class Diverging(TinyPipeline):
    """Its predictions are NaN for some prompts."""

    texts = TEXTS[1:]

    @functools.wraps(TinyPipeline.__call__)
    def __call__(self, prompt, *args, **options):
        if prompt in self.texts:
            options["guidance_scale"] = float("nan")
        return super().__call__(prompt, *args, **options)


def shifted():
    pipeline = TinyPipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    return pipeline


def configured():
    pipeline = TinyPipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=True)
    return pipeline


def adapted():
    pipeline = TinyPipeline()
    pipeline.transformer.peft_config = {"style": None}
    return pipeline


def quantized():
    pipeline = TinyPipeline()
    pipeline.transformer.register_to_config(quantization_config={"quant_method": "some"})
    return pipeline


@pytest.mark.parametrize("change", [shifted, configured, adapted, quantized])
def test_a_pipeline_unlike_the_recorded_one_is_run_uncached(run, change):
    """Bug: plans of a pipeline at shift 7 were fitted on what one at shift 3 had shown."""
    unchanged, teachers, said = loaded(run)
    assert not said
    runner, others, said = loaded(run, change())
    assert said == ["running 2 recorded prompts uncached, to see what their solver sees"]
    assert runner.folder != unchanged.folder
    if change is shifted:
        assert not np.array_equal(teachers[0].latents, others[0].latents)
    assert not loaded(run, change())[2]  # kept, under a name of its own


def test_a_prompt_that_is_not_finite_is_left_out(run, monkeypatch):
    """Bug: one such prompt ended planning by runs for all."""
    shutil.rmtree(run / "trajectories")
    runner, trajectories, said = loaded(run, Diverging())
    assert said[1:] == ["prompt 1 is left out: its predictions or latents are not finite"]
    assert len(trajectories) == 1
    assert [group.prompt.prompt for group in runner.groups] == TEXTS[:1]
    shutil.rmtree(run / "trajectories")
    monkeypatch.setattr(Diverging, "texts", TEXTS)
    with pytest.raises(NoSolver, match="no recorded prompt"):
        loaded(run, Diverging())


@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_a_lost_file_of_a_trajectory_is_made_anew(run, ending):
    file = min(run.glob(f"trajectories/*/*.{ending}"))
    content = file.read_bytes()
    file.unlink()
    _, trajectories, said = loaded(run)
    assert said == ["running 1 recorded prompts uncached, to see what their solver sees"]
    assert len(trajectories) == 2 and file.read_bytes() == content


@pytest.mark.parametrize("ending", ["npy", "npz"])
@pytest.mark.parametrize("left", [0.0, 0.5, 0.9])
def test_a_damaged_trajectory_says_what_to_do(run, ending, left):
    file = min(run.glob(f"trajectories/*/*.{ending}"))
    content = file.read_bytes()
    file.write_bytes(content[: int(left * len(content))])
    with pytest.raises(CorruptShard, match="delete it") as error:
        loaded(run)
    assert str(file.with_suffix(".npz")) in str(error.value)
    file.with_suffix(".npz").unlink()
    assert len(loaded(run)[1]) == 2
