"""Planning a recorded run: from the log alone, with real runs on held-out prompts, and on the command line."""

import dataclasses
import json
import shutil

import pandas as pd
import pytest
from click.testing import CliRunner
from tiny_pipeline import TinyPipeline

import coeffs
from calibrate.cli import cli
from calibrate.errors import InvalidOption
from calibrate.fitting.draft import draft_entry
from calibrate.planning import plan as planning
from calibrate.planning.candidates import BASELINES, DAMPINGS, Candidate, Planner
from calibrate.planning.plan import budget_for, plan
from calibrate.planning.results import fewer_steps_verdict, planned_entry
from calibrate.recording.record import record
from calibrate.runs.gram_log import load_grams
from calibrate.runs.pairs import load_run

TEXTS = [f"a thing number {number}" for number in range(4)]
UNSEEN = [f"another thing {number}" for number in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "run"
    record(
        TinyPipeline(),
        prompts=TEXTS,
        steps=10,
        guidance_scale=2.0,
        out=path,
        progress=False,
        gram=True,
    )
    coeffs.save(draft_entry(load_run(path), degree=1), path / "entry.yaml")
    return path


def test_candidates_compute_their_budget_and_hold_both_baselines(folder):
    planner = Planner(load_grams(folder), 7)
    for computed in (2, 4, 7):
        found = planner.candidates(computed)
        assert [c.name for c in found[:2]] == list(BASELINES)
        assert all(c.schedule.count("C") == computed and len(c.schedule) == 10 for c in found)
        assert len({json.dumps(c.setting("").identity(), sort_keys=True) for c in found}) == len(
            found
        )
        short = planner.shortlist(computed, 2)
        assert {c.forecast_of for c in short} == {"residual", "output"} and len(short) < len(found)


def test_fitted_candidates_carry_a_row_of_weights_for_each_skipped_step(folder):
    log = load_grams(folder)
    fitted = next(c for c in Planner(log, 5).candidates(5) if c.forecast == "fitted")
    record_of_it = fitted.as_plan(log, {"speedup": 1.5, "nothing": float("nan")})
    assert record_of_it.weights_by_step == fitted.weights
    assert record_of_it.sigmas[0] == 1.0 and len(record_of_it.sigmas) == 11
    assert record_of_it.figures == {"speedup": 1.5, "nothing": None}


def test_damped_weights_lie_between_the_fitted_ones_and_reuse(folder):
    """Bug: fitted weights alone amplify what earlier forecasts did to the anchors, most of all at small budgets."""
    planner = Planner(load_grams(folder), 5)
    found = [c for c in planner.candidates(5) if c.name.startswith("planned, fitted outputs")]
    assert {c.damping for c in found} == {0.0, *DAMPINGS}
    for candidate in found:
        plain = planner.stages["output"].fit(candidate.schedule)
        for step, (newest, *older) in candidate.weights.items():
            assert newest == pytest.approx(
                candidate.damping + (1 - candidate.damping) * plain[step][0]
            )
            assert older == pytest.approx(
                [(1 - candidate.damping) * weight for weight in plain[step][1:]]
            )


def runs_of(**values):
    """Runs of candidates: name -> dB of each prompt."""
    rows = [
        {
            "policy": name,
            "psnr_db": db,
            "prompt_id": f"p{number}",
            "seed": 0,
            "identical": False,
            "broken": False,
        }
        for name, dbs in values.items()
        for number, db in enumerate(dbs)
    ]
    found = [
        Candidate(name, "CS", "reuse", "output", additive=error)
        for name, error in zip(values, (0.3, 0.2, 0.1, 0.05), strict=False)
    ]
    return found, pd.DataFrame(rows)


def test_runs_and_log_choose_together():
    """Bug: a few choosing prompts told apart what differs by their luck.

    Open-loop errors are 0.3, 0.2 and 0.1: the log sees b 3.5 dB and c 9.5 dB above a.
    """
    assert planning._winner(*runs_of(a=[40.0], b=[37.0], c=[30.0])).name == "b"
    assert planning._winner(*runs_of(a=[40.0], b=[36.0], c=[30.0])).name == "a"
    assert planning._winner(*runs_of(a=[40.0], b=[37.0], c=[31.0])).name == "c"
    # The worst prompt counts half: 35 instead of 40 on average of the two.
    assert planning._winner(*runs_of(a=[45.0, 35.0], b=[36.4, 36.4])).name == "b"


def test_a_damped_forecast_is_taken_where_it_costs_little():
    """Bug: undamped weights won on six prompts and lost 8 dB on the one of twenty that feeds errors back."""
    weights = {1: (1.2, -0.2)}
    found = [
        Candidate(
            f"damped {damping}", "CS", "fitted", "output", weights, additive=0.1, damping=damping
        )
        for damping in (0.0, 0.1, 0.3, 0.5)
    ]
    values = dict(zip([c.name for c in found], ([50.0], [49.0], [48.1], [47.0]), strict=True))
    _, rows = runs_of(**values)
    assert planning._winner(found, rows).damping == 0.3
    assert planning._winner(found[:1], rows).damping == 0.0
    # Only the weights give way, not the planned schedule to the uniform one.
    other = Candidate(
        "uniform, damped 0.5", "CS", "fitted", "output", weights, additive=0.2, damping=0.5
    )
    _, more = runs_of(**{other.name: [49.5]})
    assert planning._winner([*found, other], pd.concat([rows, more])).damping == 0.3


def test_the_log_sends_candidates_to_the_final_as_well():
    """Bug: two screening prompts threw out what the log, with twenty, found best."""
    found, rows = runs_of(a=[44.0], b=[43.0], c=[42.0], d=[20.0])
    more = [
        Candidate(name, "CS", "reuse", "output", additive=error)
        for name, error in (("e", 0.01), ("f", 0.9))
    ]
    rows = pd.concat([rows, runs_of(e=[10.0], f=[11.0])[1]])
    assert [c.name for c in planning._finalists([*found, *more], rows)] == ["a", "b", "c", "e", "d"]


def test_plans_without_runs_touch_nothing(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = CliRunner().invoke(cli, ["plan", str(folder), "--computed", "5,3", "--no-runs"])
    assert result.exit_code == 0, result.output
    assert (
        "planned" in result.stdout and "planning 5, 3 of 10 steps from 4 samples" in result.stderr
    )
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--computed", "11"], "11 computed steps of 10"),
        (["--computed", "a"], "expected whole numbers"),
        ([], "give exactly one"),
        (["--computed", "3", "--speedup", "2"], "give exactly one"),
        (["--computed", "3", "--steps", "12"], "expected 3 to 10"),
    ],
)
def test_wrong_use_is_one_line(folder, arguments, said):
    result = CliRunner().invoke(cli, ["plan", str(folder), "--no-runs", *arguments])
    assert result.exit_code == 2 and said in result.stderr and "Traceback" not in result.output


def test_real_runs_choose_judge_and_write_the_plan(folder, monkeypatch):
    options = {
        "computed": [5],
        "model": TinyPipeline(),
        "prompts": UNSEEN,
        "choosing": 1,
        "num_prompts": 2,
    }
    first = plan(folder, **options, candidates=2, progress=False)
    assert len(first) == 1 and first[0].figures["prompts"] == 2
    entry = coeffs.load(folder / "entry.yaml")
    found = entry.plans[0]
    assert found.computed_steps == 5 and found.schedule == first[0].winner.schedule
    figures = found.figures
    assert {
        "psnr_db",
        "worst_psnr_db",
        "speedup",
        "uniform_reuse_psnr_db",
    } <= set(figures)
    assert figures["fewer_steps_psnr_db"] is not None
    # Of two prompts no interval can be given.
    assert (
        figures["gain_db"] is not None and figures["gain_low_db"] is figures["gain_high_db"] is None
    )
    kept = json.loads((folder / "plan.json").read_text())
    assert kept[0]["winner"]["schedule"] == found.schedule and len(kept[0]["candidates"]) >= 4

    # Again, nothing is run a second time, and another budget's plan is added to the first.
    monkeypatch.setattr(
        "calibrate.trials.sampler.Sampler.run", lambda *args, **more: pytest.fail("run again")
    )
    again = plan(folder, **options, candidates=2, progress=False)
    assert again[0].figures == first[0].figures


def test_all_candidates_are_screened_and_the_best_are_run_on_more(folder, tmp_path):
    """Bug: a winner by the luck of two prompts; and twelve candidates on every prompt take an hour."""
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    prompts = [f"unseen {number}" for number in range(4)]
    plan(
        copy,
        computed=[4],
        model=TinyPipeline(),
        prompts=prompts,
        choosing=3,
        num_prompts=1,
        progress=False,
    )
    kept = json.loads((copy / "plan.json").read_text())
    row = next(row for row in kept if row["computed"] == 4)
    counts = sorted(c["prompts"] for c in row["candidates"])
    finalists = planning.BY_RUNS + planning.BY_LOG
    assert counts[-finalists:] == [3] * finalists and set(counts[:-finalists]) == {1}
    winner = next(c for c in row["candidates"] if c["name"] == row["winner"]["name"])
    assert winner["prompts"] == 3


def test_weights_that_only_the_recorder_knew_are_asked_for(folder):
    """Bug: a run of a model from a folder remembers its name, not where it was, and said only that nobody knows it."""
    result = CliRunner().invoke(cli, ["plan", str(folder), "--computed", "5"])
    assert result.exit_code == 2 and "give their folder with --model" in result.stderr, (
        result.output
    )


def test_plans_are_kept_by_budget(folder):
    entry, log = coeffs.load(folder / "entry.yaml"), load_grams(folder)
    planner = Planner(log, 6)

    def planned(computed, **figures):
        candidate = planner.candidates(computed)[-1]
        return planning._planned(planner, computed, [candidate], candidate, figures)

    once = planned_entry(entry, log, [planned(6, psnr_db=30.0, fewer_steps_psnr_db=20.0)])
    twice = planned_entry(once, log, [planned(3, psnr_db=20.0, fewer_steps_psnr_db=25.0)])
    counts = [p.computed_steps for p in twice.plans]
    assert counts == sorted(counts, reverse=True) and {6, 3} <= set(counts)
    assert [w for w in twice.warnings if w.startswith("plan: ")] == [
        "plan: fewer steps without a cache is better at 3 (25.0 against 20.0 dB) computed steps"
    ]
    assert fewer_steps_verdict([planned(6, psnr_db=30.0, fewer_steps_psnr_db=20.0)]) is None


def test_speedup_becomes_a_budget():
    """Half of 10 ms is head: at twice the speed nothing may be computed. At 1.25, 6 of 10 steps."""
    assert budget_for(1.25, 10.0, 5.0, 10) == 6
    assert budget_for(1.0, 10.0, 9.0, 50) == 50
    with pytest.raises(InvalidOption, match=r"expected 1 to 1\.82"):
        budget_for(2.0, 10.0, 5.0, 10)


def test_plans_of_the_entry_enter_a_verification(folder):
    from calibrate.verifying.lineup import Lineup, planned

    entry = coeffs.load(folder / "entry.yaml")
    weights = ((1.2, -0.2),) * 5
    plans = (
        coeffs.Plan(
            schedule="CCSCSCSCSS", forecast="fitted", forecast_of="output", weights=weights
        ),
        coeffs.Plan(schedule="CSSSCSSSSS"),
        coeffs.Plan(schedule="CCSS"),
    )

    def settings(entry, budgets):
        run, counted = load_run(folder), lambda setting: 0.0
        lineup = Lineup(entry=entry, run=run, num_steps=10, budgets=budgets, counted=counted)
        return planned(lineup, "plan")

    found = settings(dataclasses.replace(entry, plans=plans), [5, 2])
    assert [setting.budget for setting in found] == [5, 2]
    assert found[0].plan.weights_by_step[2] == (1.2, -0.2) and found[0].plan.forecast_of == "output"
    assert found[1].identity() == {"schedule": "CSSSCSSSSS"}
    with pytest.raises(InvalidOption, match="calibrate plan --computed 7"):
        settings(entry, [7])
