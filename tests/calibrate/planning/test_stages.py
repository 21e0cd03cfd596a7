"""Plans over two experts: the budget is divided exactly, nothing is carried over, and a real run agrees."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pipeline import TinyExperts

import coeffs
from calibrate.errors import InvalidOption
from calibrate.fitting.draft import draft_entry
from calibrate.planning.candidates import Planner
from calibrate.planning.plan import plan
from calibrate.planning.problem import FORECASTS, Problem, Weights, schedule_of
from calibrate.planning.stages import StagedProgram, Stages
from calibrate.recording.record import record
from calibrate.runs.gram_log import GramLog, NoPlan, load_gram, load_grams
from calibrate.runs.pairs import load_run
from runtime import apply_tea_cache

TEXTS = [f"a thing number {number}" for number in range(4)]


def logs_of(sizes, seed=0, samples=3):
    """Curved random paths, one log per expert, and the outputs of each as tensors (samples, T, size)."""
    random = np.random.default_rng(seed)
    levels = np.sort(random.uniform(0.05, 1, sum(sizes)))[::-1]
    bounds = np.append(levels, 0.0)
    logs, tensors, begin = [], [], 0
    for size in sizes:
        own = levels[begin : begin + size]
        outputs = np.einsum(
            "tk,pkn->ptn", own[:, None] ** np.arange(3), random.normal(size=(samples, 3, 30))
        )
        outputs += 0.05 * random.normal(size=outputs.shape)
        gram = np.einsum("ptn,pun->ptu", outputs, outputs)
        ids = tuple(f"p{i}" for i in range(samples))
        logs.append(GramLog(gram, None, bounds[begin : begin + size + 1], ids, first_step=begin))
        tensors.append(outputs)
        begin += size
    return logs, tensors


def all_schedules(stages, computed):
    steps = [step for step in range(stages.num_steps) if step not in stages.starts]
    for others in combinations(steps, computed - len(stages.starts)):
        yield schedule_of((*stages.starts, *others), stages.num_steps)


@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3).filter(
        lambda sizes: 2 <= sum(sizes) <= 9
    ),
    forecast=st.sampled_from(FORECASTS),
    peak=st.sampled_from([1.0, 2.0]),
    damping=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 1000),
)
def test_the_division_of_the_budget_equals_brute_force(sizes, forecast, peak, damping, seed):
    stages = Stages.of(logs_of(sizes, seed)[0])
    costs = stages.costs(forecast, peak, damping=damping)
    program = StagedProgram(costs, stages.num_steps)
    for computed in range(len(sizes), stages.num_steps + 1):
        schedule, cost = program.best(computed)
        assert schedule.count("C") == computed and stages.holds(schedule)
        assert cost == pytest.approx(stages.cost(costs, schedule), rel=1e-9, abs=1e-15)
        assert cost == pytest.approx(
            min(stages.cost(costs, other) for other in all_schedules(stages, computed)),
            rel=1e-9,
            abs=1e-15,
        )


def test_damped_costs_are_those_of_the_damped_forecast():
    """Bug: a schedule planned for weights other than those that are deployed."""
    stages = Stages.of(logs_of([8], samples=5)[0])
    problem, schedule = stages.problems[0], "CSCSSCSS"
    for damping in (0.0, 0.4, 1.0):
        costs = stages.cost(stages.costs("fitted", damping=damping), schedule)
        own = stages.additive(schedule, Weights(stages.fit(schedule, damping), 0.0)).mean()
        assert costs == pytest.approx(own, rel=0.5)  # out of fold against in sample
    reused = problem.additive(schedule, "reuse").mean()
    assert stages.cost(stages.costs("fitted", damping=1.0), schedule) == pytest.approx(
        reused, rel=1e-9
    )


def test_one_stage_is_the_problem_itself():
    logs, _ = logs_of([7])
    stages, problem = Stages.of(logs), Problem.of(logs[0])
    for forecast in FORECASTS:
        how = Weights(stages.fit("CSCSSCS"), 0.0) if forecast == "fitted" else forecast
        np.testing.assert_allclose(
            stages.additive("CSCSSCS", how), problem.additive("CSCSSCS", how)
        )
        np.testing.assert_allclose(stages.signed("CSCSSCS", how), problem.signed("CSCSSCS", how))
    assert stages.uniform(3) == "CSCSCSS"


def test_errors_of_two_experts_add_up_over_the_whole_path():
    logs, tensors = logs_of([3, 4])
    stages = Stages.of(logs)
    increments = [np.diff(log.sigmas) for log in logs]
    path = sum(
        np.linalg.norm(t, axis=-1) @ np.abs(i) for t, i in zip(tensors, increments, strict=True)
    )
    first, second = tensors
    # C S C | C S S C: step 1 reuses step 0; steps 4 and 5 reuse step 3, the second expert's first.
    added = abs(increments[0][1]) * np.linalg.norm(first[:, 1] - first[:, 0], axis=-1)
    for step in (1, 2):
        added = added + abs(increments[1][step]) * np.linalg.norm(
            second[:, step] - second[:, 0], axis=-1
        )
    np.testing.assert_allclose(stages.additive("CSCCSSC", "reuse"), added / path, rtol=1e-6)
    assert list(stages.fit("CSCCSSC")) == [1, 4, 5]
    assert len(stages.fit("CSCCSSC")[4]) == 1  # nothing of the first expert


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=3), data=st.data())
@settings(max_examples=60, deadline=None)
def test_uniform_schedules_begin_every_expert_with_a_computed_step(sizes, data):
    stages = Stages(
        tuple(Problem(np.ones((1, n, n)), np.arange(n, 0, -1.0), np.ones(n)) for n in sizes)
    )
    computed = data.draw(st.integers(1, sum(sizes)))
    if computed < len(sizes):
        with pytest.raises(InvalidOption, match=f"at least one for each of {len(sizes)} experts"):
            stages.uniform(computed)
    else:
        schedule = stages.uniform(computed)
        assert schedule.count("C") == computed and stages.holds(schedule)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("experts") / "run"
    record(
        TinyExperts(),
        prompts=TEXTS,
        steps=10,
        guidance_scale=2.0,
        out=path,
        progress=False,
        gram=True,
    )
    coeffs.save(draft_entry(load_run(path), degree=1), path / "entry.yaml")
    return path


def test_the_log_says_where_each_expert_begins(folder):
    logs = load_grams(folder)
    assert [log.expert for log in logs] == ["transformer", "transformer_2"]
    assert logs[0].first_step == 0 and logs[1].first_step == logs[0].num_steps
    assert logs[0].num_steps + logs[1].num_steps == 10
    assert logs[0].sigmas[-1] == logs[1].sigmas[0] and logs[1].sigmas[-1] == 0
    with pytest.raises(NoPlan, match="experts transformer, transformer_2"):
        load_gram(folder)
    with pytest.raises(NoPlan, match="would take over elsewhere"):
        plan(folder, computed=[5], steps=8, runs=False)


def test_a_plan_for_two_experts_is_run_and_written_and_applied(folder):
    options = {
        "prompts": ["another thing", "one more"],
        "choosing": 1,
        "num_prompts": 1,
        "progress": False,
    }
    planned = plan(folder, computed=[6], model=TinyExperts(), candidates=2, **options)
    entry = coeffs.load(folder / "entry.yaml")
    found = entry.plans[0]
    begin = load_grams(folder)[1].first_step
    assert found.schedule[begin] == "C" and found.schedule.count("C") == 6
    assert planned[0].figures["psnr_db"] > 0 and len(found.sigmas) == 11
    pipe = TinyExperts()
    fitted = next(c for c in Planner(load_grams(folder), 6).candidates(6) if c.forecast == "fitted")
    for one in (found, fitted.as_plan(load_grams(folder), {})):
        with apply_tea_cache(pipe, schedule=one) as cache:
            pipe("a thing", num_inference_steps=10)
        patterns = {expert: branch.pattern for (expert, _), branch in cache.stats.branches.items()}
        assert patterns["transformer"] + patterns["transformer_2"] == one.schedule
