"""The Gram log: what the recorder multiplies, how branches combine, other step counts, damaged logs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_pipeline import TinyPipeline

from calibrate.errors import RunFolderError
from calibrate.planning.problem import Problem
from calibrate.planning.search import schedule_cost
from calibrate.recording import inner_products as products
from calibrate.recording.inner_products import Products, gram_matrix
from calibrate.recording.record import record
from calibrate.recording.recorder import Recorder
from calibrate.runs.gram_log import (
    GramLog,
    NoPlan,
    at_steps,
    guided,
    interpolation_error,
    load_grams,
    read_gram,
)
from runtime import denoisers

STEPS = 6


def recorded(pipe, **options):
    """One generation with everything that the denoiser returned."""
    outputs = {"cond": [], "uncond": []}
    order = iter(["cond", "uncond"] * STEPS)

    def keep(module, args, kwargs, output):
        outputs[next(order)].append(output[0].double().flatten())

    handle = pipe.transformer.register_forward_hook(keep, with_kwargs=True)
    with (
        torch.inference_mode(),
        Recorder(denoisers(pipe), pipe, **{"gram": True, **options}) as recorder,
    ):
        recorder.start()
        image = pipe(
            "a fish", num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0)
        ).images
        found = recorder.finish()
    handle.remove()
    return found, {name: torch.stack(rows) for name, rows in outputs.items()}, image


def test_the_log_holds_all_inner_products_of_the_outputs():
    found, outputs, _ = recorded(TinyPipeline())
    assert list(found.gram["transformer/branches"]) == ["cond", "uncond"]
    rows = torch.cat([outputs["cond"], outputs["uncond"]])
    np.testing.assert_allclose(
        found.gram["transformer/output"], (rows @ rows.T).numpy(), rtol=1e-12
    )
    sigmas = found.gram["transformer/sigmas"]
    assert sigmas.shape == (STEPS + 1,) and sigmas[0] == 1.0 and sigmas[-1] == 0.0


def test_errors_of_a_schedule_follow_from_the_log_as_from_the_tensors():
    """With guidance, cross terms and a forecast: to 1e-5 of the error."""
    found, outputs, _ = recorded(TinyPipeline())
    scale = 2.0
    gram = guided(found.gram["transformer/output"], ["cond", "uncond"], scale)
    sigmas = found.gram["transformer/sigmas"]
    gains = np.ones(STEPS + 1)
    problem = Problem(gram[None], sigmas[:STEPS], np.diff(sigmas), gains)
    velocity = outputs["uncond"] + scale * (outputs["cond"] - outputs["uncond"])
    schedule, levels = "CCSCSS", sigmas
    path = (velocity.norm(dim=1) * torch.tensor(-np.diff(sigmas))).sum()
    errors = {1: torch.zeros_like(velocity[0]), 3: torch.zeros_like(velocity[0])}
    for step, (newest, older) in {2: (1, 0), 4: (3, 1), 5: (3, 1)}.items():
        slope = (levels[step] - levels[newest]) / (levels[newest] - levels[older])
        guess = velocity[newest] + slope * (velocity[newest] - velocity[older])
        errors[newest] += (sigmas[step + 1] - sigmas[step]) * (velocity[step] - guess)
    expected = sum(float(error.norm() / path) for error in errors.values())
    assert schedule_cost(problem.costs("linear"), schedule) == pytest.approx(
        expected, rel=1e-5
    )


def test_the_log_changes_neither_images_nor_pairs():
    with_gram, _, image = recorded(TinyPipeline())
    without, _, same = recorded(TinyPipeline(), gram=False)
    assert (image == same).all() and without.gram == {}
    assert with_gram.rows == without.rows


def test_beyond_the_budget_outputs_go_to_the_host(monkeypatch):
    exact, _, _ = recorded(TinyPipeline())
    monkeypatch.setattr(products, "OUTPUT_BYTES", 3 * 16 * 4 * 4)
    bounded, _, _ = recorded(TinyPipeline())
    np.testing.assert_array_equal(
        bounded.gram["transformer/output"], exact.gram["transformer/output"]
    )


def test_outputs_beyond_the_budget_are_copies(monkeypatch):
    """Bug: on the CPU they were the model's own tensors, and a pipeline may write into those."""
    monkeypatch.setattr(products, "OUTPUT_BYTES", 0)
    kept = Products()
    for step in range(2):
        output = torch.ones(4)
        kept.add_output("cond", step, output)
        output.zero_()
    assert kept.matrices("transformer")["transformer/output"].tolist() == [
        [4.0, 4.0],
        [4.0, 4.0],
    ]


def test_held_bytes_stay_within_the_budget(monkeypatch):
    monkeypatch.setattr(products, "OUTPUT_BYTES", 4000)
    kept = Products()
    for step in range(12):
        kept.add_output("cond", step, torch.zeros(200))
        assert kept.held_bytes <= 4000
    assert kept.held_bytes == 0


def test_what_the_recorder_holds_counts_the_outputs_for_planning():
    pipe, held = TinyPipeline(), {}
    for gram in (False, True):
        with torch.inference_mode(), Recorder(denoisers(pipe), pipe, gram=gram) as recorder:
            recorder.start()
            pipe(
                "a fish",
                num_inference_steps=STEPS,
                generator=torch.Generator().manual_seed(0),
            )
            held[gram] = recorder.held_bytes()
    outputs = [tensor for row in recorded(pipe)[1].values() for tensor in row]
    assert held[True] - held[False] >= sum(4 * tensor.numel() for tensor in outputs)


def test_seconds_of_the_stack_end_where_it_is_left(monkeypatch):
    """Bug: where a call was observed, those of the layers after the stack were among them."""
    clock = {"now": 0.0}
    host = SimpleNamespace(perf_counter=lambda: clock["now"])
    monkeypatch.setattr("calibrate.recording.handler.time", host)
    pipe = TinyPipeline()
    for module, seconds in (
        (pipe.transformer.transformer_blocks[1], 8.0),
        (pipe.transformer.proj_out, 1.0),
    ):

        def passes(*seen, seconds=seconds):
            clock["now"] += seconds

        module.register_forward_hook(passes)
    with torch.inference_mode(), Recorder(denoisers(pipe), pipe) as recorder:
        recorder.start()
        pipe("a fish", STEPS, generator=torch.Generator().manual_seed(0))
        timing = recorder.finish().timing
    expected = {"call_seconds": 9.0, "stack_seconds": 8.0, "calls": 2 * STEPS}
    assert timing == {"transformer": expected}


def test_long_rows_are_multiplied_in_pieces():
    rows = [torch.randn(2**18 + 17) for _ in range(3)]
    stacked = torch.stack(rows).double()
    torch.testing.assert_close(gram_matrix(rows), stacked @ stacked.T)


def test_steps_of_different_shape_give_no_log():
    kept = Products()
    kept.add_output("cond", 0, torch.zeros(4))
    kept.add_output("cond", 1, torch.zeros(5))
    assert kept.matrices("transformer") == {}


def a_log(steps=12, samples=2, noise=0.0):
    random = np.random.default_rng(0)
    sigmas = np.append(np.linspace(1, 0.1, steps), 0)
    tensors = np.einsum(
        "tk,pkn->ptn",
        sigmas[:steps, None] ** np.arange(3),
        random.normal(size=(samples, 3, 20)),
    )
    tensors += noise * random.normal(size=tensors.shape)
    gram = np.einsum("ptn,pun->ptu", tensors, tensors)
    return tensors, GramLog(gram, sigmas)


def test_fewer_steps_are_planned_from_the_same_log():
    _, log = a_log(23)
    half = at_steps(log, 12)
    assert half.num_steps == 12 and half.sigmas[0] == 1.0 and half.sigmas[-1] == 0.0
    np.testing.assert_allclose(
        half.output, log.output[:, ::2, ::2]
    )  # every second level is a recorded one
    assert at_steps(log, 23) is log


def test_what_cannot_be_planned_anew_is_refused():
    _, smooth = a_log(12)
    with pytest.raises(NoPlan, match="expected 3 to 12"):
        at_steps(smooth, 20)
    _, rough = a_log(12, noise=3.0)
    assert interpolation_error(rough) > 0.2 and interpolation_error(smooth) < 0.05
    with pytest.raises(NoPlan, match="not smooth enough"):
        at_steps(rough, 6)
    unknown = GramLog(smooth.output, np.full(13, np.nan))
    with pytest.raises(NoPlan, match="no sigmas"):
        at_steps(unknown, 6)
    assert (unknown.levels == -np.arange(12)).all() and (unknown.increments == 1).all()


def test_branches_that_are_no_guidance_add_up():
    gram = np.arange(16.0).reshape(4, 4)
    np.testing.assert_allclose(
        guided(gram, ["first", "second"], 3.0), gram[:2, :2] + gram[2:, 2:]
    )
    np.testing.assert_allclose(guided(gram, ["cond"], 3.0), gram)


@pytest.fixture
def a_run(tmp_path):
    return record(
        TinyPipeline(),
        prompts=["a fish", "a bird"],
        steps=STEPS,
        guidance_scale=2.0,
        out=tmp_path / "run",
        gram=True,
    )


def test_a_run_keeps_its_log(a_run):
    log = load_grams(a_run.path)[0]
    assert log.output.shape == log.guided.shape == (2, STEPS, STEPS)
    # The run's own guidance combines the branches.
    kept = read_gram(sorted((a_run.path / "gram").iterdir())[0])["transformer"]
    branches = kept["branches"].tolist()
    np.testing.assert_allclose(log.output[0], guided(kept["output"], branches, 2.0))
    assert not np.allclose(log.output[0], guided(kept["output"], branches, 1.0))


def test_runs_without_a_log_and_damaged_logs_are_named(a_run):
    files = sorted((a_run.path / "gram").iterdir())
    files[0].write_bytes(files[0].read_bytes()[:200])
    with pytest.raises(RunFolderError, match=files[0].name):
        load_grams(a_run.path)
    for file in files:
        file.unlink()
    with pytest.raises(NoPlan, match="this adds them"):
        load_grams(a_run.path)
