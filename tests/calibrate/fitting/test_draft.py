"""The draft entry: complete, reproducible, and outspoken about what is doubtful."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from analysis_data import make_frame, make_run

import calibrate
import coeffs
from calibrate.errors import CalibrateError
from calibrate.fitting.choice import fit_branches
from calibrate.fitting.draft import fit as draft_entry
from calibrate.fitting.draft import protocol_of, slug
from calibrate.fitting.score import score, score_polynomial
from calibrate.model.call import recorded_arguments
from calibrate.runs.pairs import load_run
from coeffs import Polynomial


def same_but_for_the_date(*entries):
    return len({
        coeffs.dump(dataclasses.replace(one, source=dataclasses.replace(one.source, created=None, command=None)))
        for one in entries
    }) == 1  # fmt: skip


def warned(frame, **options):
    return " | ".join(draft_entry(load_run(frame), **options).warnings)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return load_run(
        make_run(tmp_path_factory.mktemp("runs") / "run", make_frame(prompts=12, steps=30))
    )


@pytest.fixture(scope="module")
def entry(run):
    return draft_entry(run, command="calibrate fit RUN")


def test_the_entry_says_everything_and_survives_its_file(entry, run):
    assert coeffs.loads(coeffs.dump(entry)) == entry
    assert (entry.model, entry.version, entry.status) == ("some-model", 0, "measured")
    assert (entry.signal, entry.target, entry.sign_rule) == (
        "modulated_input",
        "output",
        "clamp",
    )
    assert (
        entry.transformer_class == "SomeTransformer2DModel"
        and entry.checkpoint.repository == "some/model"
    )
    assert entry.protocol.num_steps == 30 and entry.protocol.guidance_scale == 4.5
    assert entry.source.log_sha256 == run.log_sha256 and entry.source.run_id == "0123abcd"
    assert entry.source.command == "calibrate fit RUN" and entry.source.torch == "2.13.0"
    expert = entry.experts["transformer"]
    assert list(expert.branches) == ["cond", "uncond", "pooled"]
    for branch, fit in expert.branches.items():
        pairs = run.pairs(branch=branch)
        assert fit.domain == (pairs["x"].min(), pairs["x"].max())
        assert (fit.counts.prompts, fit.counts.pairs) == (
            12,
            len(pairs),
        ) and fit.counts.excluded_non_finite == 0
        assert fit.counts.trajectories == 12 * pairs["branch"].nunique()
        assert len(fit.intervals["coefficients"]) == 5 and fit.why
        for (low, high), value in zip(
            fit.intervals["coefficients"], fit.coefficients_high_to_low, strict=True
        ):
            assert low < value < high
        assert fit.figures["r2_held_out"] < fit.figures["r2"] < 1


def test_polyfit_over_the_files_gives_the_entry(entry, run):
    rows = pd.read_parquet(run.path / "pairs")
    for branch, fit in entry.experts["transformer"].branches.items():
        own = rows if branch == "pooled" else rows[rows["branch"] == branch]
        plain = next(one for one in (fit, *fit.alternatives) if one.method == "polyfit")
        np.testing.assert_allclose(
            plain.coefficients_high_to_low,
            np.polyfit(own["x"], own["y_output"], 4),
            rtol=1e-9,
        )


def test_the_same_pairs_give_the_same_bytes(entry, run):
    again = draft_entry(load_run(run.path))
    assert same_but_for_the_date(entry, again)
    shuffled = dataclasses.replace(
        load_run(run.rows.sample(frac=1, random_state=1)), manifest=run.manifest
    )
    untimed = dataclasses.replace(run, timing={})
    assert same_but_for_the_date(entry, draft_entry(shuffled), draft_entry(untimed))


def test_thresholds_are_replayed_with_intervals(entry):
    assert len(entry.thresholds) >= 8
    for row in entry.thresholds:
        assert (
            row.kind == "replay"
            and row.speedup is None
            and row.num_steps == 30
            and 1 <= row.computed_steps <= 30
        )
        assert "95 % interval of the mean" in row.note
    steps = [row.computed_steps for row in entry.thresholds]
    assert steps == sorted(steps, reverse=True) and steps[-1] < 8


def test_magnitude_ratios_are_means_per_step(entry):
    expected = [1.0, *(1 - 0.01 * step for step in range(1, 30))]
    for branch in ("cond", "uncond"):
        np.testing.assert_allclose(entry.experts["transformer"].mag_ratios[branch], expected)


def test_experts_apart():
    frame = make_frame(prompts=4, steps=8, experts=("transformer", "transformer_2"))
    frame.loc[frame["expert"] == "transformer_2", "y_output"] *= 3
    entry = draft_entry(load_run(frame))
    first, second = (
        entry.fit(expert, "cond").polynomial() for expert in ("transformer", "transformer_2")
    )
    assert second.predict(0.15) == pytest.approx(3 * first.predict(0.15), rel=0.1)
    assert entry.thresholds[0].num_steps == 16


def test_one_slot_gets_the_pooled_fit_only_where_pooling_is_cheap():
    alike = make_frame(prompts=8, noise=0.003)
    alike["y_output"] /= alike["branch"].map({"cond": 1.0, "uncond": 1.5})
    assert draft_entry(load_run(alike)).experts["transformer"].recommended == "pooled"
    entry = draft_entry(load_run(make_frame(prompts=8, noise=0.003)))
    assert entry.experts["transformer"].recommended == "cond"
    assert any(
        "one polynomial for all branches costs held-out RMSE" in text
        for text in entry.warnings
    )


def shaped(shape, **arguments):
    frame, random = make_frame(branches=("cond",), **arguments), np.random.default_rng(0)
    return load_run(
        frame.assign(y_output=shape(frame["x"]) + random.normal(0, 0.002, len(frame)))
    )


def test_the_recommendation_follows_the_shape_and_the_held_out_error():
    (rising,) = fit_branches(shaped(lambda x: 0.05 + x))
    assert rising.fit.method == "polyfit" and "non-negative" in rising.fit.why
    (falling,) = fit_branches(shaped(lambda x: 0.4 - x))
    assert falling.fit.method == "polyfit" and "it falls in places" in falling.fit.why
    assert falling.fit.alternatives[0].method == "constrained"
    (negative,) = fit_branches(shaped(lambda x: 4 * (x - 0.15) ** 2 - 0.01))
    assert (
        negative.fit.method == "constrained"
        and "negative on part of its domain" in negative.fit.why
    )
    (forced,) = fit_branches(shaped(lambda x: 4 * (x - 0.15) ** 2 - 0.01), method="polyfit")
    assert forced.fit.method == "polyfit" and forced.fit.why == "chosen by hand"
    for run in (shaped(lambda x: 0.05 + x), shaped(lambda x: 0.4 - x)):
        (one,) = fit_branches(run, method="constrained")
        assert one.fit.method == "constrained"
        assert draft_entry(run, method="constrained").fit().method == "constrained"


def test_every_doubt_is_a_warning():
    frame = make_frame(prompts=10, branches=("cond",))
    assert "recorded at 20 steps only" in warned(frame)
    assert "one prompt only: nothing can be held out" in warned(make_frame(prompts=1))
    assert "4 prompts only" in warned(make_frame(prompts=4))
    assert "one pair per trajectory only" in warned(make_frame(prompts=10, steps=2))
    assert "x is constant (0.1 to 0.1): degree 0 instead of 4" in warned(frame.assign(x=0.1))
    assert "the target is constant" in warned(frame.assign(y_output=0.2))
    random = np.random.default_rng(0)
    assert "no better than a constant" in warned(
        frame.assign(y_output=random.uniform(0.1, 0.2, len(frame)))
    )
    noisy = frame.assign(y_output=frame["y_output"] + random.uniform(0, 0.2, len(frame)))
    assert "poor fit (held-out R² 0." in warned(noisy)
    trend = frame.assign(
        x=0.01 * frame["step"] + random.uniform(0, 0.01, len(frame)),
        y_output=0.02 * frame["step"] + random.uniform(0, 0.01, len(frame)),
    )
    assert "x adds nothing measurable beyond the schedule" in warned(trend)
    assert "the mean of each step predicts better than this polynomial" in warned(trend)
    assert "x is the same for all prompts at each step" in warned(
        frame, signal="time_embedding"
    )
    informative = make_frame(prompts=16, branches=("cond",), noise=0.002)
    assert (
        warned(informative, degree=3)
        == "recorded at 20 steps only: thresholds do not carry over to other numbers of steps"
    )
    broken = frame.copy()
    broken.loc[5, "y_output"] = np.nan
    assert "1 of 190 pairs excluded: 1 with non-finite y_output" in warned(broken)
    assert draft_entry(load_run(broken)).fit(branch="cond").counts.excluded_non_finite == 1
    negative = frame.assign(y_output=4 * (frame["x"] - 0.15) ** 2 - 0.01)
    assert "negative on part of its domain" in warned(negative, method="polyfit")


def test_a_branch_of_few_or_no_usable_pairs_does_not_stop_the_others():
    frame = make_frame(prompts=5)
    uncond = frame["branch"] == "uncond"
    broken = draft_entry(load_run(frame.assign(y_output=frame["y_output"].mask(uncond))))
    assert list(broken.experts["transformer"].branches) == ["cond"] and broken.thresholds
    entry = draft_entry(load_run(frame[~uncond | (frame["prompt_id"] == "p00")]))
    assert entry.fit(branch="uncond").figures["r2_held_out"] is None
    assert entry.experts["transformer"].recommended == "pooled"


def test_an_infinite_signal_is_computed_and_leaves_the_intervals_as_they_are():
    frame = make_frame(prompts=5)
    frame.loc[7, "x"] = np.inf
    entry = draft_entry(
        load_run(frame)
    )  # a warning from arithmetic with it would be an error
    assert "1 of 190 pairs excluded: 1 with non-finite x" in entry.warnings
    assert all("95 % interval of the mean" in row.note for row in entry.thresholds)


def test_the_embedded_model_and_an_unfinished_run_are_named(run):
    more = [*run.manifest["prompts"], {"prompt_id": "late", "seed": 0}]
    manifest = run.manifest | {"model": "tiny-longcat-image", "prompts": more}
    text = " | ".join(draft_entry(dataclasses.replace(run, manifest=manifest)).warnings)
    assert (
        "measured on the embedded tiny model" in text and "12 of 13 prompts recorded" in text
    )


def test_what_the_log_lacks_is_refused():
    run = load_run(make_frame(prompts=3).assign(x_time_embedding=np.nan, y_hidden=np.nan))
    for options in ({"signal": "time_embedding"}, {"target": "hidden"}):
        with pytest.raises(CalibrateError, match="which this model or log lacks"):
            draft_entry(run, **options)
    with pytest.raises(
        CalibrateError, match="method 'magic': expected one of auto, polyfit, constrained"
    ):
        draft_entry(run, method="magic")
    with pytest.raises(CalibrateError, match="degree 9"):
        draft_entry(run, degree=9)


def test_fit_is_the_same_for_notebooks(entry, run):
    assert same_but_for_the_date(entry, calibrate.fit(run.path), calibrate.fit(run))
    assert calibrate.fit(run.rows, degree=2, target="residual").fit().degree == 2


@pytest.mark.parametrize("name,expected", [
    ("LongCat-Image", "longcat-image"), ("a/b/My Model", "b/my-model"), ("/x/FLUX.1_dev/", "x/flux.1_dev"),
    ("??", "unnamed"),
])  # fmt: skip
def test_names_become_registry_names(name, expected):
    assert slug(name) == expected


def test_a_stranger_by_hand(run):
    pairs = run.pairs(branch="cond")
    x, y = pairs["x"].to_numpy(), pairs["y"].to_numpy()
    found = score_polynomial(Polynomial((2.0, -0.4), (0.1, 0.15), "signed"), pairs)
    predicted = 2 * np.maximum(x, 0.1) - 0.4
    assert found["bias"] == pytest.approx(np.mean(predicted - y))
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean((predicted - y) ** 2)))
    assert found["r2"] == pytest.approx(
        1 - np.sum((predicted - y) ** 2) / np.sum((y - y.mean()) ** 2)
    )
    assert found["below_domain"] == np.mean(x < 0.1) and found["above_domain"] == np.mean(
        x > 0.15
    )
    assert found["negative"] == np.mean(x < 0.2)


def test_a_factor_costs_r2_but_nothing_after_rescaling(entry, run):
    pairs, own = (
        run.pairs(branch="cond"),
        np.array(entry.fit(branch="cond").coefficients_high_to_low),
    )
    found = score_polynomial(Polynomial(tuple(20 * own)), pairs)
    assert found["r2"] < -400 and found["r2_rescaled"] == pytest.approx(
        entry.fit(branch="cond").figures["r2"], abs=0.01
    )


def test_entries_are_scored_on_what_they_were_made_for(entry, run):
    foreign = dataclasses.replace(
        entry, transformer_class="Other", signal="time_embedding", target="unknown"
    )
    table = score([entry, foreign, [498.65, -283.78, 55.86, -3.82, 0.264]], run)
    assert len(table) == 6 and table["pairs"].eq(12 * 29).all()
    own, other, bare = (table.iloc[row] for row in (0, 2, 4))
    assert (
        own["r2"] == pytest.approx(entry.fit(branch="cond").figures["r2"])
        and own["note"] == ""
    )
    assert (
        other["signal"] == "time_embedding"
        and "made for Other" in other["note"]
        and "target unknown" in other["note"]
    )
    assert bare["candidate"] == "coefficients" and bare["r2"] < -10


def test_an_entry_for_a_forecasts_error_still_loads_and_says_what_it_is_scored_on(entry, run):
    old = dataclasses.replace(
        entry, target="forecast_error", forecast="linear", forecast_of="output"
    )
    assert coeffs.loads(coeffs.dump(old)) == old
    table = score([old], run)
    assert set(table["note"]) == {"target forecast_error, scored on output"}


def test_an_entrys_call_arguments_come_back_as_they_were_given():
    """Bug: a list came back as its text, and went to the pipeline as such."""
    given = {
        "sigmas": [1.0, 0.5],
        "layers": ["a", "b"],
        "rewrite": False,
        "scale": 4,
        "mode": "fast",
    }
    stated = vars(protocol_of({"call_arguments": given}))
    assert recorded_arguments(stated) == given
