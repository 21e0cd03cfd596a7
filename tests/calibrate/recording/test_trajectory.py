"""What the solver saw while a run was recorded is what an uncached run of its own shows, and planning needs none."""

import shutil

import numpy as np
import pytest
import tiny_pipelines
import torch
from tiny_pipeline import TinyExperts, TinyPipeline

import calibrate.recording.recorder
import coeffs
from calibrate.fitting.draft import fit
from calibrate.planning.lockstep import generations
from calibrate.planning.trajectories import Runner, load_trajectories, record_trajectory
from calibrate.recording.inner_products import trajectory_of
from calibrate.recording.record import record
from calibrate.recording.recorder import Recorder
from calibrate.runs.pairs import load_run
from calibrate.runs.trajectory import Trajectory
from calibrate.trials.case import open_case
from runtime import OwnLoop, denoisers

TEXTS = ["a fish", "a bird"]
CASES = {
    "two branches": (TinyPipeline, {"steps": 6}),
    "two experts": (TinyExperts, {"steps": 6}),
    "bfloat16": (lambda: "tiny-longcat-image", {"steps": 4}),
}


def same(one, other):
    for name, value in vars(one).items():
        np.testing.assert_array_equal(value, getattr(other, name))


@pytest.fixture(
    scope="module",
    params=["two branches", "two experts", pytest.param("bfloat16", marks=pytest.mark.slow)],
)
def run(request, tmp_path_factory):
    make, options = CASES[request.param]
    path, model = tmp_path_factory.mktemp("run") / "run", make()
    record(model, prompts=TEXTS, out=path, progress=False, **options)
    coeffs.save(fit(load_run(path), degree=1), path / "entry.yaml")
    case = open_case(path, model=model, registry=None, out=None, dtype=None, device="auto")
    return path, case


def files_of(path):
    return {
        file.relative_to(path): file.read_bytes()
        for file in sorted(path.glob("trajectories/*/*"))
    }


def test_planning_finds_what_an_uncached_run_would_show(run, tmp_path):
    path, case = run
    said = []
    recorded = load_trajectories(Runner(case, False, said.append))
    assert len(recorded) == 2 and not said
    copy = tmp_path / "run"
    shutil.copytree(path, copy, ignore=shutil.ignore_patterns("trajectories"))
    again = open_case(
        copy,
        model=case.checkpoint.pipeline,
        registry=None,
        out=None,
        dtype=None,
        device="auto",
    )
    uncached = load_trajectories(Runner(again, False, said.append))
    assert "running 2 recorded prompts uncached" in said[0]
    for one, other in zip(recorded, uncached, strict=True):
        same(one, other)
    assert files_of(path) == files_of(copy)


def test_an_interrupted_recording_ends_with_the_same_trajectories(tmp_path):
    options = {"prompts": TEXTS, "steps": 6, "out": tmp_path / "run", "progress": False}
    first = record(TinyPipeline(), **options)
    before = files_of(first.path)
    lost = first.groups[1].name
    first.shard(lost).unlink()
    for file in first.path.glob(f"trajectories/*/{lost}.*"):
        file.unlink()
    assert len(files_of(first.path)) == len(before) - 2
    record(TinyPipeline(), **options)
    assert files_of(first.path) == before


def test_without_gram_no_latents_are_kept(tmp_path):
    run = record(
        TinyPipeline(), prompts=TEXTS[:1], steps=6, out=tmp_path, progress=False, gram=False
    )
    assert run.is_complete and not (run.path / "trajectories").exists()


@pytest.mark.parametrize("name", tiny_pipelines.CASES)
def test_every_pipeline_shows_the_recorder_what_it_shows_planning(name):
    case = tiny_pipelines.CASES[name]()

    def call(own):
        arguments = {**case.arguments, **case.latent}
        return own(**arguments, generator=torch.Generator().manual_seed(0))

    with (
        torch.inference_mode(),
        Recorder(denoisers(case.pipe), case.pipe, gram=True) as recorder,
    ):
        recorder.start()
        call(case.pipe)
        recorded = recorder.finish().trajectory()
    with generations(case.pipe, denoisers(case.pipe), [call]) as (generation,):
        same(recorded, record_trajectory(generation))


@pytest.mark.parametrize(
    "change",
    [
        lambda steps: steps[:2],
        lambda steps: [*steps[:3], ("a", torch.ones(6), torch.ones(6))],
        lambda steps: [*steps[:3], ("a", torch.full((4,), torch.nan), torch.ones(4))],
    ],
    ids=["too short", "another size", "not finite"],
)
def test_a_generation_of_which_no_plan_can_be_made_costs_no_prompt(change):
    steps = [("a", torch.randn(4), torch.randn(4)) for _ in range(4)]
    end = torch.randn(2, 2)
    own = trajectory_of(steps, end, None)
    assert own.latents.shape == (5, 2, 2) and np.isnan(own.sigmas).all()
    assert trajectory_of(change(steps), end, None) is None


@pytest.mark.parametrize("error", [MemoryError(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("where", ["trajectory_of", "write"])
def test_a_trajectory_that_cannot_be_kept_costs_no_pairs(
    tmp_path, monkeypatch, caplog, where, error
):
    def fail(*arguments):
        raise error

    if where == "write":
        monkeypatch.setattr(Trajectory, "write", fail)
    else:
        monkeypatch.setattr(calibrate.recording.recorder, "trajectory_of", fail)
    run = record(TinyPipeline(), prompts=TEXTS, steps=6, out=tmp_path, progress=False)
    assert run.is_complete and not run.failures() and not files_of(tmp_path)
    assert [message.count("no trajectory") for message in caplog.messages] == [1, 1]


def test_no_trajectory_is_made_where_none_is_kept(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        calibrate.recording.recorder, "trajectory_of", lambda *seen: made.append(seen)
    )
    pipe = TinyPipeline()

    def generate(prompt, seed):
        return pipe(prompt, generator=torch.Generator().manual_seed(seed)).images

    loop = OwnLoop(pipe.transformer, pipe.scheduler)
    options = {"generate": generate, "modules": loop, "prompts": TEXTS, "progress": False}
    assert record("toy", out=tmp_path, **options).is_complete and not made


@pytest.mark.parametrize("replaceable", [True, False])
def test_a_callable_keeps_what_planning_can_use(tmp_path, replaceable):
    """Weights are fitted with schedulers of their own, which a callable must take."""
    pipe = TinyPipeline()
    loop = OwnLoop(pipe.transformer, pipe.scheduler)

    def generate(prompt, seed, scheduler=pipe.scheduler):
        pipe.scheduler = scheduler
        return pipe(prompt, generator=torch.Generator().manual_seed(seed)).images

    taken = generate if replaceable else lambda prompt, seed: generate(prompt, seed)
    record("toy", generate=taken, modules=loop, prompts=TEXTS, out=tmp_path, progress=False)
    assert len(files_of(tmp_path)) == (4 if replaceable else 0)
