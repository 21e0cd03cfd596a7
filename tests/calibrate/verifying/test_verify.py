"""A whole verification on a real but tiny transformer, interrupted too, and what the command says of it."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from tiny_pipeline import TinyPipeline

import coeffs
from calibrate.cli import cli
from calibrate.errors import InvalidOption, InvalidPrompts
from calibrate.fitting.draft import fit as draft_entry
from calibrate.model.prompts import load_prompts
from calibrate.planning.plan import plan
from calibrate.recording.record import record
from calibrate.runs.pairs import load_run
from calibrate.runs.purposes import purposes
from calibrate.trials import baselines as policies
from calibrate.trials.baselines import InvalidBudget
from calibrate.trials.bench import Bench
from calibrate.trials.case import open_case
from calibrate.trials.setting import (
    APART_GATE,
    FEWER_STEPS_2,
    GATE,
    PLAN,
    UNIFORM,
    gate_setting,
)
from calibrate.verifying.lineup import POLICIES, checked_policies
from calibrate.verifying.results import load_verification
from calibrate.verifying.tuning import Lineup
from calibrate.verifying.verify import AVERAGE_SHARE, _announce, verify

pytestmark = pytest.mark.slow

TEXTS = [f"a thing number {number}" for number in range(5)]
UNSEEN = [f"another thing {number}" for number in range(4)]
JUDGED = UNSEEN[:3]  # the fewest with a spread of their own
QUICK = ("gate", "uniform", "fewer-steps", "magcache")
# FLUX has many published sets; BudCache's search takes many runs and has its own test.
ALL = tuple(name for name in POLICIES if name not in ("published", "budcache"))


# --- a whole verification


@pytest.fixture(scope="module")
def pipe():
    return TinyPipeline()


@pytest.fixture(scope="module")
def fitted(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    record(pipe, prompts=TEXTS, steps=8, out=folder, progress=False, gram=True)
    plans = (coeffs.Plan(schedule="CCSCSCSS", forecast="linear", forecast_of="output"),)
    entry = dataclasses.replace(draft_entry(load_run(folder), degree=2), plans=plans)
    coeffs.save(entry, folder / "entry.yaml")
    return folder


@pytest.fixture(scope="module")
def verified(pipe, fitted):
    return verify(
        fitted, model=pipe, prompts=JUDGED, budgets=[6, 4], policies=ALL, progress=False
    )


def test_every_policy_runs_or_says_why_not(verified):
    ran, refused = set(verified.results["policy"]), verified.facts["refused"]
    assert {GATE, APART_GATE, PLAN, FEWER_STEPS_2, "FirstBlockCache"} <= ran
    assert {UNIFORM, "fewer steps", "MagCache's rule"} <= ran
    assert {POLICIES[key].label for key in UNIFORM_KEYS} <= ran
    assert "SeaCache" in refused and len(refused["SeaCache"]) > 20
    for policy in (
        *(POLICIES[key].label for key in UNIFORM_KEYS),
        "fewer steps",
        FEWER_STEPS_2,
    ):
        rows = verified.results[verified.results["policy"] == policy]
        assert (rows["computed_steps"] == rows["budget"]).all()


def test_lpips_stands_beside_psnr_and_ssim(pipe, fitted, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "calibrate.trials.bench.Lpips",
        lambda: type(
            "Distance", (), {"checksum": "x", "__call__": lambda self, a, b: 0.25}
        )(),
    )
    folder = shutil.copytree(fitted, tmp_path / "run")
    options = {
        "prompts": UNSEEN[:1],
        "budgets": [4],
        "policies": ["uniform"],
        "progress": False,
    }
    found = verify(folder, model=pipe, lpips=True, **options)
    assert (found.results["lpips"] == 0.25).all()
    assert "LPIPS" in found.facts["measures"]["lpips"]
    rows = coeffs.load(folder / "entry.yaml").thresholds
    assert [row.lpips for row in rows if row.kind == "verified"] == [0.25]


def test_the_noise_floor_of_a_float32_model_counts_as_identical(verified):
    assert verified.facts["floor"]["identical"]


def test_the_pipeline_is_left_as_it_was(verified, pipe, fitted):
    torch = pytest.importorskip("torch")
    before = TinyPipeline()("x", generator=torch.Generator().manual_seed(3)).images
    after = pipe("x", generator=torch.Generator().manual_seed(3)).images
    np.testing.assert_array_equal(before, after)
    assert "decode" not in pipe.vae.__dict__


def test_measures_are_those_of_the_samples(verified, pipe):
    """One result recomputed by hand: the same plan through the runtime, PSNR from its definition."""
    torch = pytest.importorskip("torch")
    from runtime import apply_tea_cache

    row = verified.results.query("policy == @UNIFORM and budget == 4").iloc[0]
    settings = {"num_inference_steps": 8}
    uncached = pipe(
        row["prompt"], generator=torch.Generator().manual_seed(int(row["seed"])), **settings
    ).images[0]
    with apply_tea_cache(pipe, schedule="CSCSCSCS"):
        cached = pipe(
            row["prompt"],
            generator=torch.Generator().manual_seed(int(row["seed"])),
            **settings,
        ).images[0]
    error = np.mean((cached.astype(float) - uncached.astype(float)) ** 2)
    assert row["psnr_db"] == pytest.approx(-10 * np.log10(error), abs=1e-6)
    assert set(row["patterns"].values()) == {"CSCSCSCS"}


def test_replayed_and_real_patterns_are_both_kept(verified):
    rows = verified.results[verified.results["policy"] == GATE]
    for row in rows.itertuples():
        assert (
            set(row.replayed)
            == set(row.patterns)
            == {"transformer/cond", "transformer/uncond"}
        )
        wrong = [
            sum(a != b for a, b in zip(row.replayed[k], row.patterns[k], strict=True))
            for k in row.patterns
        ]
        assert row.disagreement == np.mean(wrong)


def test_verified_thresholds_go_into_the_entry_and_the_runtime_uses_them(
    verified, fitted, pipe
):
    from runtime import apply_tea_cache

    entry = coeffs.load(fitted / "entry.yaml")
    rows = [row for row in entry.thresholds if row.kind == "verified"]
    assert rows and all(row.psnr_db is not None and row.hardware == "cpu" for row in rows)
    assert [row.kind for row in entry.thresholds].count("replay") > 0
    if rows[-1].speedup > 1.01:
        with apply_tea_cache(pipe, entry, speedup=1.01) as cache:
            pipe("x", num_inference_steps=8)
        assert cache.settings["threshold"] > 0


def test_a_second_verification_runs_nothing_again(verified, fitted, pipe):
    lines = (fitted / "verify" / "results.jsonl").read_text()
    again = verify(
        fitted, model=pipe, prompts=JUDGED, budgets=[6, 4], policies=ALL, progress=False
    )
    assert (fitted / "verify" / "results.jsonl").read_text() == lines
    assert again.headline == verified.headline
    kept = load_verification(fitted)
    assert (
        kept.headline == verified.headline
        and kept.comparisons[0].difference == again.comparisons[0].difference
    )


def test_an_interrupted_verification_continues(verified, fitted, pipe, tmp_path):
    """Half the results and a line cut short: only what is missing is run, and the finding is the same."""
    copy = tmp_path / "tiny"
    shutil.copytree(fitted, copy)
    lines = [
        line for line in (copy / "verify" / "results.jsonl").read_text().split("\n") if line
    ]
    (copy / "verify" / "results.jsonl").write_text(
        "\n".join(lines[: len(lines) // 2]) + '\n{"key": "ab'
    )
    again = verify(
        copy, model=pipe, prompts=JUDGED, budgets=[6, 4], policies=ALL, progress=False
    )
    pd.testing.assert_series_equal(again.results["psnr_db"], verified.results["psnr_db"])
    keys = [
        json.loads(line)["key"]
        for line in (copy / "verify" / "results.jsonl").read_text().split("\n")
        if '"row"' in line
    ]
    assert len(keys) == len(set(keys)) == len(lines)
    # Speed-ups of what was run now are against uncached runs of now, not of a machine that was as busy as it was then.
    anew = again.results["seconds"].to_numpy() != verified.results["seconds"].to_numpy()
    same = (
        again.results["uncached_seconds"].to_numpy()
        == verified.results["uncached_seconds"].to_numpy()
    )
    assert anew.any() and not anew.all() and (same == ~anew).all()


def test_a_new_fit_makes_only_the_gates_results_anew(verified, fitted, pipe, tmp_path):
    copy = tmp_path / "tiny"
    shutil.copytree(fitted, copy)
    before = len((copy / "verify" / "results.jsonl").read_text().split("\n"))
    coeffs.save(draft_entry(load_run(copy), degree=1), copy / "entry.yaml")
    verify(copy, model=pipe, prompts=JUDGED, budgets=[6, 4], policies=QUICK, progress=False)
    added = len((copy / "verify" / "results.jsonl").read_text().split("\n")) - before
    assert 0 < added <= 2 * len(JUDGED)


def test_thresholds_can_be_given(fitted, pipe):
    threshold = next(row.threshold for row in coeffs.load(fitted / "entry.yaml").thresholds)
    found = verify(
        fitted,
        model=pipe,
        prompts=UNSEEN[:2],
        thresholds=[threshold],
        policies=["gate", "uniform"],
        progress=False,
    )
    assert set(found.results.query("policy == @GATE")["threshold"]) == {threshold}


def test_an_entry_without_a_run_is_verified_from_its_references(fitted, pipe, tmp_path):
    entry = dataclasses.replace(coeffs.load(fitted / "entry.yaml"), version=3)
    found = verify(
        entry,
        model=pipe,
        prompts=UNSEEN[:2],
        budgets=[5],
        policies=["gate", "uniform"],
        out=tmp_path / "v",
        progress=False,
    )
    assert (tmp_path / "v" / "entry.yaml").exists() and set(found.results["policy"]) >= {
        UNIFORM
    }


def test_a_gate_that_cannot_reach_any_budget_is_said_to_be_so(fitted, pipe, tmp_path):
    copy = tmp_path / "tiny"
    shutil.copytree(fitted, copy)
    entry = coeffs.load(copy / "entry.yaml")
    never = coeffs.Fit(coefficients_high_to_low=(0.0, 0.0), domain=(0.0, 9.0))
    experts = {"transformer": coeffs.Expert(recommended="pooled", branches={"pooled": never})}
    coeffs.save(dataclasses.replace(entry, experts=experts), copy / "entry.yaml")
    found = verify(
        copy,
        model=pipe,
        prompts=UNSEEN,
        budgets=[6],
        policies=["gate", "uniform"],
        progress=False,
    )
    assert found.headline.startswith("The fitted gate could not be run: no threshold gives")
    assert set(found.results["policy"]) == {UNIFORM} and found.facts["drift"] is None
    assert load_verification(copy).headline == found.headline


def test_prompts_that_chose_plans_are_never_judged(fitted, pipe, tmp_path):
    """Bug: plan took the first held-out prompts to choose by, and verify judged the plan on the same."""
    copy = tmp_path / "tiny"
    shutil.copytree(fitted, copy, ignore=shutil.ignore_patterns("verify"))
    options = dict(model=pipe, prompts=UNSEEN, progress=False)
    plan(copy, computed=[4], choosing=2, num_prompts=2, candidates=1, **options)
    noted = purposes(copy)
    chose = {prompt for prompt, purpose in noted.items() if purpose == "choosing"}
    assert len(chose) == 2 and sorted(noted.values()) == ["choosing"] * 2 + ["judged"] * 2
    found = verify(copy, budgets=[4], policies=["plan", "uniform"], **options)
    assert (
        len(set(found.results["prompt_id"])) == 2
        and not set(found.results["prompt_id"]) & chose
    )


def test_the_usual_policies_run_and_their_number_is_said_before_anything_is_loaded(
    fitted, monkeypatch
):
    """Bug: 69 generations a prompt by default, and not a word about how many."""
    assert checked_policies(None) == ["gate", "plan", "uniform", "fewer-steps"]
    assert len(checked_policies(["all"])) > 10 and "apart" in checked_policies(["all"])
    said = []

    class Loading(Exception):
        pass

    def load(*args, **options):
        raise Loading

    monkeypatch.setattr("calibrate.trials.case.load_session", load)
    with pytest.raises(Loading):
        verify(fitted, model=TinyPipeline(), prompts=UNSEEN, progress=False, say=said.append)
    # 4 policies at 5 budgets on 4 prompts; the gate tuned at each by 2 prompts, about twice.
    start = "4 prompts, 5 budgets: 8 uncached runs, 80 cached ones, up to about 20 to tune by; about "
    assert said[0].startswith(start)


def test_recorded_prompts_are_never_judged(fitted, pipe):
    with pytest.raises(InvalidPrompts, match="every prompt of it was recorded"):
        verify(fitted, model=pipe, prompts=TEXTS, progress=False)


def test_a_model_that_makes_nan_is_named(fitted, tmp_path):
    copy = tmp_path / "tiny"
    shutil.copytree(fitted, copy, ignore=shutil.ignore_patterns("verify"))
    broken = TinyPipeline()
    broken.corrupt = True
    with pytest.raises(InvalidOption, match="uncached model itself makes NaN"):
        verify(
            copy, model=broken, prompts=UNSEEN, budgets=[4], policies=QUICK, progress=False
        )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"policies": ["gate", "magic"]}, "policy 'magic'"),
        ({"budgets": [4], "thresholds": [0.1]}, "one follows from the other"),
        ({"thresholds": [-1.0]}, "expected numbers of 0 or more"),
        ({"budgets": [9]}, "9 computed steps of 8"),
        ({"out": "elsewhere"}, "leave --out away"),
    ],
)
def test_wrong_options_are_named(fitted, pipe, options, text):
    with pytest.raises((InvalidOption, InvalidBudget), match=text):
        verify(fitted, model=pipe, prompts=UNSEEN, progress=False, **options)


def test_an_entry_for_another_class_is_refused(pipe, tmp_path):
    with pytest.raises(
        InvalidOption,
        match=r"is for QwenImageTransformer2DModel, but the pipeline has FluxTransformer",
    ):
        verify(
            "vllm-omni/qwen-image", model=pipe, prompts=UNSEEN, out=tmp_path, progress=False
        )


def test_a_run_without_a_fit_says_what_to_do(fitted, pipe, tmp_path):
    copy = tmp_path / "tiny"
    shutil.copytree(fitted, copy, ignore=shutil.ignore_patterns("verify", "entry.yaml"))
    with pytest.raises(InvalidOption, match="calibrate fit"):
        verify(copy, model=pipe, prompts=UNSEEN, progress=False)


# --- uniform skipping with every forecast


UNIFORM_KEYS = ("uniform", "uniform-linear", "uniform-linear-output")


def uniform_setting(fitted, key, budget, path=None, **other):
    run = dataclasses.replace(load_run(fitted), path=path)
    lineup = Lineup(
        entry=coeffs.load(fitted / "entry.yaml"),
        run=run,
        num_steps=8,
        budgets=[budget],
        **{"bench": None, **other},
    )
    policy = POLICIES[key]
    (setting,) = policy.make(lineup, policy.label)
    return setting


def test_uniform_settings_say_their_forecast_and_nothing_that_the_runtime_does_anyway(
    fitted,
):
    described = {key: uniform_setting(fitted, key, 4).identity() for key in UNIFORM_KEYS}
    assert described["uniform"] == {"schedule": "CSCSCSCS"}
    assert described["uniform-linear"] == {"schedule": "CSCSCSCS", "forecast": "linear"}
    linear = {"schedule": "CSCSCSCS", "forecast": "linear", "forecast_of": "output"}
    assert described["uniform-linear-output"] == linear


@pytest.mark.slow
def test_the_fitted_uniform_rival_has_seen_all_recorded_prompts(fitted, pipe, tmp_path):
    """Bug: it had the weights of a few, and needed a plan of the same budget."""
    run, said = tmp_path / "run", []
    shutil.copytree(fitted, run, ignore=shutil.ignore_patterns("verify", "trajectories"))
    bench = Bench(open_case(run, model=pipe), load_prompts(UNSEEN), progress=False)
    made = uniform_setting(run, "uniform-fitted", 3, path=run, bench=bench, say=said.append)
    plan = made.plan
    assert plan.schedule == policies.uniform(8, 3) and plan.forecast == "fitted"
    count = len(load_run(run).manifest["prompts"])
    assert said[-1].startswith(f"fitting 3 of 8 steps on {count} prompts")
    (file,) = run.glob("trajectories/*/fit-*.json")
    rows = json.loads(file.read_text())["rows"]
    assert {str(step): list(row) for step, row in plan.weights_by_step.items()} == rows
    assert max(map(len, plan.weights)) == 3
    # Where plans were bounded, so is their rival.
    bounds = [{"steps": 8, "computed": 4, "anchors": bound} for bound in (None, 2)]
    (run / "plan.json").write_text(json.dumps(bounds))
    bounded = uniform_setting(run, "uniform-fitted", 3, path=run, bench=bench).plan
    assert max(map(len, bounded.weights)) == 2


def test_fits_are_announced_by_the_recorded_prompts_and_are_no_runs_of_the_bar():
    said, times = [], []
    case = SimpleNamespace(
        entry=None,
        recorded_prompts=["a", "b", "c"],
        time_of=lambda runs: times.append(runs) or "",
    )
    prompts = SimpleNamespace(prompts=["d"])
    assert _announce(case, ["uniform-fitted"], 2, False, prompts, said.append) == 2
    assert said[0].endswith("2 cached ones, up to 6 to fit on")
    assert times == [2 + AVERAGE_SHARE * (2 + 6)]


def test_without_a_run_nothing_can_be_fitted(fitted):
    with pytest.raises(InvalidOption, match="no run"):
        uniform_setting(fitted, "uniform-fitted", 3)


# --- gates


def test_gate_settings_say_threshold_branches_and_what_decides(fitted):
    entry = coeffs.load(fitted / "entry.yaml")
    setting = gate_setting(GATE, entry, 4, 0.1)
    assert setting.options == {"threshold": 0.1, "branches": "together"}
    assert set(setting.identity()) == {"threshold", "branches", "entry"}


def test_notes_and_tables_of_an_entry_do_not_make_its_results_anew(fitted):
    entry = coeffs.load(fitted / "entry.yaml")
    noted = dataclasses.replace(entry, notes="another word", thresholds=())
    other = dataclasses.replace(entry, max_skips=1)
    same, changed = (gate_setting(GATE, e, 4, 0.1).identity() for e in (noted, other))
    assert same == gate_setting(GATE, entry, 4, 0.1).identity() != changed


# --- the command line


def test_branches_decide_together_unless_the_policy_is_apart(verified):
    together = verified.results[verified.results["policy"] == GATE]
    assert all(len(set(row.patterns.values())) == 1 for row in together.itertuples())
    assert all(len(set(row.replayed.values())) == 1 for row in together.itertuples())
    assert APART_GATE in set(verified.results["policy"])


def test_commands_have_help_with_every_policy_and_an_example():
    text = CliRunner().invoke(cli, ["verify", "--help"]).output
    assert all(
        policy in text.replace("\n", " ").replace("  ", "") or policy in text
        for policy in ("gate", "uniform")
    )
    assert "calibrate verify runs/" in text
    assert "calibrate report runs/" in CliRunner().invoke(cli, ["report", "--help"]).output
    assert set(POLICIES) >= {"gate", "uniform"}


def test_the_command_opens_with_advice_and_never_says_nan(verified, fitted, monkeypatch):
    monkeypatch.setattr(
        "calibrate.verifying.verify.verify", lambda *args, **options: verified
    )
    output = CliRunner().invoke(cli, ["verify", str(fitted)]).stdout
    first, *_ = output.splitlines()
    assert first.startswith("Use ")
    assert "nan" not in re.split(r"[^a-z]+", output.lower()) and "- to -" not in output
    words = "the plan against uniform skipping: too few prompts for a verdict (3; at least 8)"
    assert words in output


def test_what_was_verified_of_other_coefficients_is_not_written(
    verified, fitted, tmp_path, pipe
):
    """A fit that ends while a verification runs is not overwritten by it."""
    folder = tmp_path / "run"
    shutil.copytree(fitted, folder)
    plans = (coeffs.Plan(schedule="CCSCSCSS"),)

    def fitted_meanwhile(text):
        other = draft_entry(load_run(folder), degree=3)
        coeffs.save(dataclasses.replace(other, plans=plans), folder / "entry.yaml")

    said = []
    verify(
        folder, model=pipe, prompts=["a thing"], budgets=[4], policies=["gate"], progress=False,
        say=lambda text: (said.append(text), fitted_meanwhile(text)),
    )  # fmt: skip
    entry = coeffs.load(folder / "entry.yaml")
    assert entry.plans == plans and entry.fit().degree == 3
    assert not [row for row in entry.thresholds if row.kind == "verified"]
    assert "fitted anew in the meantime" in said[-1]


def test_command_line_errors_are_one_line_with_exit_code_2(tmp_path):
    result = CliRunner().invoke(cli, ["verify", str(tmp_path / "nothing")])
    assert result.exit_code == 2 and "Traceback" not in result.output
    result = CliRunner().invoke(cli, ["verify", "x", "--budgets", "1,two"])
    assert result.exit_code == 2 and "separated by commas" in result.output
