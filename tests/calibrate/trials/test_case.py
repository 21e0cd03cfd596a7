"""What real runs are made of: every setting is checked before weights are loaded, and prompts are kept back."""

import pytest
from click.testing import CliRunner

import calibrate.trials.case
from calibrate import fit, record, verify
from calibrate.cli import cli
from calibrate.errors import CalibrateError
from calibrate.model.prompts import HELD_OUT_SETS, load_prompts
from calibrate.runs.folder import RunFolder
from calibrate.runs.purposes import held_out_prompts
from calibrate.trials.case import open_case


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    record(num_prompts=2, steps=4, device="cpu", out=folder, progress=False)
    fit(folder)
    assert CliRunner().invoke(cli, ["fit", str(folder)]).exit_code == 0
    return folder


def opened(run, **options):
    settings = {
        "model": None,
        "registry": None,
        "out": None,
        "dtype": None,
        "device": "cpu",
    }
    return open_case(run, **{**settings, **options})


@pytest.fixture
def without_loading(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(calibrate.trials.case, "load_session", refuse)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budgets": [9]}, "9 computed steps of 4"),
        ({"prompts": "no-such-set"}, "No such file"),
        ({"pipe_args": {"enable_rewrite": 1}}, "did you mean enable_prompt_rewrite"),
        ({"device": "tpu"}, "--device tpu"),
        ({"model": "no-such-model"}, "no model of that name"),
    ],
)
def test_every_setting_is_checked_before_weights_are_loaded(
    run, without_loading, options, said
):
    with pytest.raises(CalibrateError, match=said):
        verify(run, progress=False, **options)


def test_recorded_prompts_of_a_set_are_refused_before_weights_are_loaded(
    run, without_loading
):
    """Bug: a run that had recorded all of its set was loaded first, and refused then."""
    texts = [group.prompt.prompt for group in RunFolder.open(run).groups]
    with pytest.raises(CalibrateError, match="every prompt of it was recorded"):
        verify(run, prompts=texts, progress=False)


@pytest.mark.parametrize("name", HELD_OUT_SETS)
def test_run_that_recorded_a_whole_set_is_judged_on_the_one_that_is_kept_back(
    run, monkeypatch, name
):
    case = opened(run)
    monkeypatch.setattr(type(case), "prompt_source", name)
    monkeypatch.setattr(type(case), "recorded_prompts", load_prompts(name).prompts)
    judged = held_out_prompts(case.purposes, case.offered(None, 0, []), 10)
    assert judged.name == f"{HELD_OUT_SETS[name]}.txt" and len(judged.prompts) == 10


@pytest.mark.parametrize("name", HELD_OUT_SETS)
def test_prompts_that_are_kept_back_are_in_no_other_set(name):
    recorded = {prompt.prompt for prompt in load_prompts(name).prompts}
    assert recorded.isdisjoint(
        prompt.prompt for prompt in load_prompts(HELD_OUT_SETS[name]).prompts
    )


def test_options_of_the_session_reach_it(run):
    case = opened(
        run, cpu_offload=True, allow_pickle=True, pipe_args={"output_type": "latent"}
    )
    assert case.loading["cpu_offload"] and case.loading["allow_pickle"]
    assert case.call.arguments["output_type"] == "latent"
    assert case.call.arguments["num_inference_steps"] == 4
    assert (
        case.at_steps(3).call.arguments["num_inference_steps"]
        == case.at_steps(3).num_steps
        == 3
    )


@pytest.mark.parametrize("command", ["record", "plan", "verify"])
def test_commands_that_load_a_model_take_the_same_options(command):
    flags = {flag for option in cli.commands[command].params for flag in option.opts}
    assert {"--model", "--device", "--pipe-arg", "--cpu-offload", "--allow-pickle"} <= flags
