"""Plans from a run: candidates, what is kept, what a winner is, and what the entry says."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from tiny_pipeline import TinyExperts, TinyPipeline

import coeffs
from calibrate.cli import cli
from calibrate.errors import InvalidOption
from calibrate.fitting.draft import fit as draft_entry
from calibrate.planning import closed_loop, trajectories
from calibrate.planning import plan as planning
from calibrate.planning.candidates import (
    BASELINES,
    UNIFORM_FITTED,
    Candidate,
    Planner,
    fewer_steps,
    finalists,
    score,
)
from calibrate.planning.closed_loop import Fit
from calibrate.planning.plan import budget_for, plan
from calibrate.planning.problem import Problem
from calibrate.planning.results import (
    Planned,
    fewer_steps_verdict,
    planned_entry,
    scores_of,
)
from calibrate.recording.record import record
from calibrate.runs.gram_log import NoPlan, load_grams
from calibrate.runs.pairs import load_run
from runtime import apply_tea_cache

TEXTS = [f"a thing number {number}" for number in range(4)]
UNSEEN = ["another thing", "one more", "yet another"]


def recorded(pipeline, path):
    record(
        pipeline,
        prompts=TEXTS,
        steps=10,
        guidance_scale=2.0,
        out=path,
        progress=False,
        gram=True,
    )
    coeffs.save(draft_entry(load_run(path), degree=1), path / "entry.yaml")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return recorded(TinyPipeline(), tmp_path_factory.mktemp("plan") / "run")


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return recorded(TinyExperts(), tmp_path_factory.mktemp("experts") / "run")


def a_plan(computed, **figures):
    schedule = "C" * computed + "S" * (10 - computed)
    candidate = Candidate("planned", computed, coeffs.Plan(schedule=schedule))
    return Planned(computed, [candidate], candidate, figures)


def a_planner(folder, what="guided", fits=None):
    logs = load_grams(folder)
    return Planner(Problem.of(logs, what), what, logs[0].sigmas, fits=fits)


def test_schedules_compute_their_budget_and_the_uniform_one_is_last(folder):
    planner = a_planner(folder)
    for computed in (2, 4, 7):
        named = planner.to_fit(computed, 2)
        assert list(named)[-1] == "uniform, fitted guided" and 1 <= len(named) <= 3
        assert len(set(named.values())) == len(named)
        assert all(s.count("C") == computed and len(s) == 10 for s in named.values())


def test_simple_candidates_hold_all_baselines(folder):
    guided = a_planner(folder).entrants(4)
    assert [c.name for c in guided[:4]] == [*BASELINES]
    outputs = a_planner(folder, "output").entrants(4)
    assert {c.plan.forecast_of for c in outputs} == {"residual", "output"}
    assert all(math.isfinite(c.cost) for c in (*guided, *outputs))
    assert [c.setting().options for c in fewer_steps(4)] == [{}, {"solver_order": 2}]


def test_runs_alone_choose_the_winner():
    """Bug: the log's word was added to the runs' dB, and took a plan 3 dB worse than its own uniform candidate."""
    values = {"planned": [30.0, 31.0], "uniform, fitted guided": [33.0, 34.0]}
    rows = pd.DataFrame(
        {"policy": name, "psnr_db": db, "prompt_id": f"p{i}", "seed": 0}
        | {"identical": False, "broken": False}
        for name, dbs in values.items()
        for i, db in enumerate(dbs)
    )
    plans = [coeffs.Plan(schedule="CSSS"), coeffs.Plan(schedule="CCSS")]
    entrants = [
        Candidate(name, 1, own, cost)
        for name, own, cost in zip(values, plans, (0.001, 0.9), strict=True)
    ]
    scores = scores_of(rows)
    winner = planning._winner(entrants, scores)
    assert winner.name == "uniform, fitted guided"
    chosen = Planned(1, entrants, winner, scores=scores).chosen
    assert (
        chosen == "scores on choosing prompts, dB: uniform, fitted guided 33.2, planned 30.2"
    )


def test_a_third_of_the_prompts_says_what_the_worst_are():
    """One bad prompt of twelve, which is mostly chance, does not decide against a better mean."""
    steady = np.full(12, 40.0)
    better = np.array([33.0, *[44.0] * 11])
    assert score(better) > score(steady) > (better.mean() + better.min()) / 2
    assert score(np.array([30.0])) == 30.0


@pytest.mark.parametrize(
    ("schedule", "left"), [(None, "bcd"), ("CSCSCS", "bcd"), ("CSSSSS", "abcd")]
)
def test_fitted_plans_that_are_worth_runs_are_the_best_on_recorded_prompts(schedule, left):
    """Three of them, and more where together they cost no more than one uncached run."""
    values = {"a": 30.0, "b": 34.0, "c": 31.0, "d": 33.0, "uniform, fitted guided": 20.0}
    plan = schedule and coeffs.Plan(schedule=schedule)
    count = schedule.count("C") if schedule else 1
    fitted = [Candidate(name, count, plan, recorded_db=db) for name, db in values.items()]
    names = [candidate.name for candidate in finalists([*fitted, *fewer_steps(count)])]
    assert names == [
        *left,
        "uniform, fitted guided",
        *(c.name for c in fewer_steps(count)),
    ]


def test_small_budgets_try_every_kind_of_schedule(folder):
    planner = a_planner(folder)
    assert len(planner.to_fit(9)) <= 4
    every = {*planner.schedules(3).values(), planner.uniform(3)}
    assert sorted(planner.to_fit(3).values()) == sorted(every)


class Asked:
    """Fits that only note what they were asked for; more prompts give other weights."""

    prompts = 20

    def __init__(self):
        self.asked = []

    def fit(self, schedule, prompts=None):
        count = prompts or self.prompts
        self.asked.append((schedule, count))
        skipped = [step for step, letter in enumerate(schedule) if letter == "S"]
        return Fit({step: (float(count),) for step in skipped}, np.full((count, 1), 0.1))


@pytest.mark.parametrize(("computed", "prompts"), [(2, 20), (5, 6)])
def test_candidates_are_fitted_on_few_prompts_and_the_winner_on_all(
    folder, computed, prompts
):
    """On three where a quarter of recording is too little for them."""
    fits = Asked()
    fits.prompts = prompts
    planner = a_planner(folder, fits=fits)
    entrants = planner.entrants(computed)
    (count,) = {count for _, count in fits.asked}
    assert 3 <= count < prompts
    cost = sum(count / prompts * schedule.count("C") / 10 for schedule, count in fits.asked)
    assert cost <= 0.25 or count == 3
    fitted = next(c for c in entrants if c.plan.forecast == "fitted")
    winner = planner.completed(fitted)
    assert fits.asked[-1] == (fitted.plan.schedule, prompts)
    assert winner.plan.weights[0] == (prompts,) and winner.name == fitted.name
    # What needs no fit is not fitted.
    count, simple = len(fits.asked), entrants[0]
    assert planner.completed(simple) is simple and len(fits.asked) == count


def test_plans_without_runs_touch_nothing(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = CliRunner().invoke(cli, ["plan", str(folder), "--computed", "5,3", "--no-runs"])
    assert result.exit_code == 0, result.output
    assert "planned" in result.stdout
    assert "planning 5, 3 of 10 steps from 4 samples" in result.stderr
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
    assert (
        result.exit_code == 2 and said in result.stderr and "Traceback" not in result.output
    )


@pytest.mark.slow
def test_real_runs_choose_judge_and_write_the_plan(folder, monkeypatch):
    options = {
        "computed": [5],
        "model": TinyPipeline(),
        "prompts": UNSEEN,
        "choosing": 1,
        "num_prompts": 2,
        "progress": False,
    }
    said = []
    # A random model has no winner to count on.
    monkeypatch.setattr(
        planning,
        "_winner",
        lambda entrants, scores: next(c for c in entrants if c.name == UNIFORM_FITTED),
    )
    first = plan(folder, **options, say=said.append)
    assert len(first) == 1 and first[0].figures["prompts"] == 2
    fits = [text for text in said if text.startswith("fitting")]
    assert fits[-1] == "fitting 5 of 10 steps on 4 prompts: 50% of what recording took"
    entry = coeffs.load(folder / "entry.yaml")
    found = entry.plans[0]
    assert found.computed_steps == 5 and found.schedule == first[0].plan.schedule
    figures = found.figures
    rivals = (
        "uniform_reuse_psnr_db",
        "uniform_linear_guided_psnr_db",
        "fewer_steps_psnr_db",
    )
    assert {"psnr_db", "worst_psnr_db", "floor_psnr_db", "speedup", *rivals} <= set(figures)
    assert found.chosen == first[0].chosen and f"dB: {first[0].winner.name} " in found.chosen
    kept = json.loads((folder / "plan.json").read_text())
    assert kept[0]["winner"]["schedule"] == found.schedule and len(kept[0]["candidates"]) >= 6

    # Again, nothing is run a second time.
    def again_run(*args, **more):
        pytest.fail("run again")

    monkeypatch.setattr("calibrate.trials.sampler.Sampler.run", again_run)
    monkeypatch.setattr(trajectories, "record_trajectory", again_run)
    monkeypatch.setattr(trajectories, "gain_of", again_run)
    monkeypatch.setattr(closed_loop, "fit", again_run)
    again = plan(folder, **options)
    assert again[0].figures == first[0].figures


@pytest.mark.slow
def test_weights_fitted_in_the_loop_beat_forecasts_by_hand(folder):
    """The same schedule, the same quantity: fitted weights before linear ones before reuse."""
    rows = json.loads((folder / "plan.json").read_text())[0]["candidates"]
    scores = {row["name"]: row["score"] for row in rows}
    # What was fitted has its score on the recorded prompts beside it.
    recorded = [row["recorded_db"] for row in rows if row["recorded_db"] is not None]
    assert len(recorded) >= 2 and min(recorded) > 0
    names = ("uniform, fitted guided", "uniform, linear guided", "uniform, reuse guided")
    fitted, linear, reuse = (scores[name] for name in names)
    assert fitted > linear + 1 > reuse + 2


@pytest.mark.slow
def test_an_unwatchable_solver_is_planned_by_its_outputs(folder, monkeypatch, tmp_path):
    def unwatchable(generation):
        raise trajectories.NoSolver("no step")

    monkeypatch.setattr(trajectories, "record_trajectory", unwatchable)
    said, copy = [], tmp_path / "run"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("trajectories"))
    options = {"prompts": UNSEEN, "choosing": 1, "num_prompts": 1, "progress": False}
    found = plan(copy, computed=[4], model=TinyPipeline(), say=said.append, **options)
    assert any("without fitted weights" in text for text in said)
    assert {c.plan.forecast_of for c in found[0].candidates if c.plan} == {
        "residual",
        "output",
    }


def test_weights_that_only_the_recorder_knew_are_asked_for(folder):
    """Bug: a run of a model from a folder remembers its name, not where it was, and said only that nobody knows it."""
    result = CliRunner().invoke(cli, ["plan", str(folder), "--computed", "5"])
    assert result.exit_code == 2, result.output
    assert "give their folder with --model" in result.stderr


def test_plans_are_kept_by_budget(folder):
    entry, sigmas = coeffs.load(folder / "entry.yaml"), load_grams(folder)[0].sigmas
    once = planned_entry(entry, sigmas, [a_plan(6, psnr_db=30.0, fewer_steps_psnr_db=20.0)])
    twice = planned_entry(once, sigmas, [a_plan(3, psnr_db=20.0, fewer_steps_psnr_db=25.0)])
    counts = [p.computed_steps for p in twice.plans]
    assert counts == sorted(counts, reverse=True) and {6, 3} <= set(counts)
    assert len(twice.plans[0].sigmas) == 11


def test_fewer_steps_are_advised_where_they_win():
    won, lost = (
        a_plan(6, psnr_db=30.0, fewer_steps_psnr_db=20.0),
        a_plan(3, psnr_db=20.0, fewer_steps_second_order_solver_psnr_db=25.0),
    )
    assert fewer_steps_verdict([won]) is None
    assert fewer_steps_verdict([won, lost]) == (
        "use fewer steps instead, without a cache, at 3 (25.0 against 20.0 dB) computed steps"
    )
    assert fewer_steps_verdict([lost]).startswith(
        "a cache is not worth it here: use fewer steps"
    )
    # A difference that prompts alone could make is none.
    assert fewer_steps_verdict([a_plan(6, psnr_db=30.0, fewer_steps_psnr_db=30.2)]) is None


def test_speedup_becomes_a_budget():
    """Half of 10 ms is head: at twice the speed nothing may be computed. At 1.25, 6 of 10 steps."""
    assert budget_for(1.25, 10.0, 5.0, 10) == 6
    assert budget_for(1.0, 10.0, 9.0, 50) == 50
    with pytest.raises(InvalidOption, match=r"expected 1 to 1\.82"):
        budget_for(2.0, 10.0, 5.0, 10)


def test_a_speedup_is_planned_from_the_recorded_timing(folder):
    found = plan(folder, speedup=1.2, runs=False)
    assert 1 <= found[0].computed < 10


def test_the_log_says_where_each_expert_begins(experts):
    logs = load_grams(experts)
    assert [log.expert for log in logs] == ["transformer", "transformer_2"]
    assert logs[0].first_step == 0 and logs[1].first_step == logs[0].num_steps
    assert logs[0].num_steps + logs[1].num_steps == 10
    assert logs[0].sigmas[-1] == logs[1].sigmas[0] and logs[1].sigmas[-1] == 0
    problem = Problem.of(logs)
    assert problem.walls == (0, logs[1].first_step) and problem.num_steps == 10
    with pytest.raises(NoPlan, match="would take over elsewhere"):
        plan(experts, computed=[5], steps=8, runs=False)


@pytest.mark.slow
def test_a_plan_for_two_experts_is_run_and_written_and_applied(experts):
    options = {"prompts": UNSEEN[:2], "choosing": 1, "num_prompts": 1, "progress": False}
    planned = plan(experts, computed=[6], model=TinyExperts(), **options)
    found = coeffs.load(experts / "entry.yaml").plans[0]
    begin = load_grams(experts)[1].first_step
    assert found.schedule[begin] == "C" and found.schedule.count("C") == 6
    assert planned[0].figures["psnr_db"] > 0 and len(found.sigmas) == 11
    pipe = TinyExperts()
    with apply_tea_cache(pipe, schedule=found) as cache:
        pipe("a thing", num_inference_steps=10)
    patterns = {
        expert: branch.pattern for (expert, _), branch in cache.stats.branches.items()
    }
    assert patterns["transformer"] + patterns["transformer_2"] == found.schedule


def test_plans_of_the_entry_enter_a_verification(folder):
    from calibrate.verifying.lineup import planned
    from calibrate.verifying.tuning import Lineup

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
        run = load_run(folder)
        lineup = Lineup(entry=entry, run=run, num_steps=10, budgets=budgets, bench=None)
        return planned(lineup, "plan")

    found = settings(dataclasses.replace(entry, plans=plans), [5, 2])
    assert [setting.budget for setting in found] == [5, 2]
    assert (
        found[0].plan.weights_by_step[2] == (1.2, -0.2)
        and found[0].plan.forecast_of == "output"
    )
    assert found[1].identity() == {"schedule": "CSSSCSSSSS"}
    with pytest.raises(InvalidOption, match="calibrate plan --computed 7"):
        settings(entry, [7])
