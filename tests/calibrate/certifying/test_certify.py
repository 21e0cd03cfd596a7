"""Certification and audit of a real but tiny transformer: what is in the entry, refusals, shifts that are caught."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_pipeline import TinyPipeline

import coeffs
from benchmarks.shifts import adapt, quantise
from calibrate import audit, certify, fit, record
from calibrate.certifying.tiers import Tier
from calibrate.cli import cli
from calibrate.errors import InvalidOption
from calibrate.runs.purposes import CHOOSING, JUDGED, note, purposes

pytestmark = pytest.mark.slow

RECORDED = [f"a thing number {number}" for number in range(4)]
UNSEEN = [f"another thing {number}" for number in range(40)]
TIERS = (Tier("lossless", {"psnr_db": 90.0}), Tier("high", {"psnr_db": 46.5}))
OPTIONS = {"risk": 0.3, "confidence": 0.9, "prompts": UNSEEN, "progress": False}
PLANS = tuple(
    coeffs.Plan(schedule=schedule) for schedule in ("CCCCCCSC", "CCCSCSCC", "CSSSSSSS")
)


@pytest.fixture(scope="module")
def pipe():
    return TinyPipeline()


@pytest.fixture(scope="module")
def fitted(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    record(pipe, prompts=RECORDED, steps=8, out=folder, progress=False)
    coeffs.save(dataclasses.replace(fit(folder), plans=PLANS), folder / "entry.yaml")
    return folder


@pytest.fixture(scope="module")
def certified(pipe, fitted):
    return certify(fitted, model=pipe, tiers=TIERS, **OPTIONS)


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "run")


def test_the_fastest_setting_of_each_policy_that_keeps_the_limits_is_in_the_entry(
    certified, fitted
):
    certificates = coeffs.load(fitted / "entry.yaml").certificates
    assert certificates == certified.certificates and certificates
    assert {one.policy for one in certificates} == {"plan", "gate", "fewer_steps"}
    for one in certificates:
        assert one.tier == "high" and one.limits == {"psnr_db": 46.5}
        assert (one.risk, one.confidence, one.tests, one.prompts) == (0.3, 0.9, 6, 12)
        assert one.missed == one.broken == 0 and one.speedup > 0
        assert one.protocol.num_steps == one.num_steps == 8
        assert (one.protocol.scheduler, one.protocol.dtype, one.source.device) == (
            "FlowMatchEulerDiscreteScheduler", "float32", "cpu",
        )  # fmt: skip
        assert one.source.torch and one.source.diffusers and len(one.prompts_sha256) == 64
    plan = next(one for one in certificates if one.policy == "plan")
    assert plan.plan == PLANS[1], "of one computed step some prompts miss it"


def test_a_tier_that_no_policy_keeps_is_said_with_the_best_that_is_reachable(certified):
    (sentence,) = certified.unreached
    assert sentence.startswith(
        "lossless (PSNR >= 90 dB): no policy keeps it for 70 % of all prompts"
    )
    assert "the best that is reachable is PSNR" in sentence


def test_no_setting_is_run_after_one_that_failed(pipe, fitted, tmp_path):
    said = []
    tiers = [Tier("strict", {"psnr_db": 90.0})]
    certify(
        copied(fitted, tmp_path),
        model=pipe,
        tiers=tiers,
        policies=["plan"],
        say=said.append,
        **OPTIONS,
    )
    assert said[1:] == ["plan at 7 of 8 steps"]


def test_the_prompts_served_nothing_else_and_serve_nothing_else_afterwards(
    pipe, fitted, certified, tmp_path
):
    folder = copied(fitted, tmp_path)
    first = set(purposes(folder))
    assert len(first) == 12
    certify(folder, model=pipe, tiers=TIERS[1:], policies=["plan"], **OPTIONS)
    second = set(purposes(folder)) - first
    assert len(second) == 7, "another question takes other prompts"
    note(folder, list(first)[:3], CHOOSING)
    note(folder, list(second), JUDGED)
    with pytest.raises(
        InvalidOption, match=r"impossible with 21 prompts that served nothing else"
    ):
        certify(folder, model=pipe, tiers=TIERS, num_prompts=30, **OPTIONS)


def test_the_same_question_runs_nothing_again(pipe, fitted, certified):
    lines = (fitted / "verify" / "results.jsonl").read_text()
    again = certify(fitted, model=pipe, tiers=TIERS, **OPTIONS)
    assert (fitted / "verify" / "results.jsonl").read_text() == lines
    assert [one.promise for one in again.certificates] == [
        one.promise for one in certified.certificates
    ]


def test_other_candidates_and_other_seeds_are_asked_with_other_prompts(
    pipe, fitted, tmp_path
):
    """Otherwise one could ask the same prompts until the answer is yes."""
    folder = copied(fitted, tmp_path)
    before = set(purposes(folder))
    options = OPTIONS | {"model": pipe, "tiers": TIERS[1:], "policies": ["plan"]}
    certify(folder, **options)
    first = set(purposes(folder)) - before
    entry = coeffs.load(folder / "entry.yaml")
    coeffs.save(dataclasses.replace(entry, plans=PLANS[:1]), folder / "entry.yaml")
    certify(folder, **options)
    second = set(purposes(folder)) - before - first
    certify(folder, seed=1000, **options)
    third = set(purposes(folder)) - before - first - second
    assert len(first) == len(second) == len(third) > 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"num_prompts": 11},
            "impossible with 11 prompts .* needs 12; .* or for --risk 0.311",
        ),
        ({"prompts": RECORDED}, "impossible with 0 prompts"),
        ({"risk": 0.0}, "expected numbers between 0 and 1"),
        (
            {"policies": ["magic"]},
            "policies magic: expected some of plan, gate, fewer-steps",
        ),
        ({"tiers": [TIERS[0], TIERS[0]]}, "each with a name of its own"),
        (
            {"tiers": [Tier("high", {"snr_db": 30.0})]},
            "a limit on snr_db, but these samples have psnr_db",
        ),
    ],
)
def test_wrong_options_are_named(pipe, fitted, tmp_path, options, text):
    with pytest.raises(InvalidOption, match=text):
        certify(copied(fitted, tmp_path), model=pipe, **{"tiers": TIERS} | OPTIONS | options)


# --- the commands


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_the_command_needs_a_run(tmp_path):
    result = run("certify", "longcat-image", "--psnr", "30")
    assert result.exit_code == 2 and "no run, and only a run tells" in result.stderr


def test_an_entry_without_certificates_cannot_be_audited(pipe, fitted, tmp_path):
    folder = copied(fitted, tmp_path)
    entry = coeffs.load(folder)
    coeffs.save(dataclasses.replace(entry, certificates=()), folder / "entry.yaml")
    with pytest.raises(InvalidOption, match="is certified for no tier; certify its run"):
        audit(folder, model=pipe)


# --- audits


class Adaptable(TinyPipeline):
    """Takes a "LoRA": a file with the size of a random change of low rank."""

    def load_lora_weights(self, path):
        adapt(self.transformer, float(Path(path).read_text()))


def quantised(bits):
    pipe = TinyPipeline()
    quantise(pipe.transformer, bits)
    return pipe


@pytest.fixture
def promised(fitted, certified, tmp_path):
    """A run whose plan alone is certified, and the file of a LoRA's size."""
    folder = shutil.copytree(fitted, tmp_path / "run")
    of_plan = [one for one in certified.certificates if one.policy == "plan"]
    entry = dataclasses.replace(coeffs.load(folder), certificates=of_plan)
    coeffs.save(entry, folder / "entry.yaml")
    (tmp_path / "small").write_text("0.3")
    (tmp_path / "large").write_text("6")
    return folder


def audited(folder, model, **options):
    fresh = [f"something else {number}" for number in range(8)]
    options = {"num_prompts": 8, "prompts": fresh} | options
    (found,) = audit(folder, model=model, progress=False, **options)
    return found


def test_an_audit_where_nothing_changed_says_yes(pipe, promised):
    found = audited(promised, pipe)
    assert found.verdict == "yes, proven anew: 0 of 8 prompts missed it"
    few = audited(promised, pipe, num_prompts=3)
    assert few.holds and not few.proven
    assert few.verdict.endswith("0 of 3 prompts missed it, a share of 0 to 0.71")
    seen = [prompt for prompt, purpose in purposes(promised).items() if purpose == "audited"]
    assert len(seen) == 8, "what an audit has shown is no longer unseen"


def test_a_lora_that_cannot_be_loaded_is_one_line(pipe, promised):
    with pytest.raises(InvalidOption, match="cannot be loaded"):
        audited(promised, pipe, lora="there-is-none")


@pytest.mark.parametrize(
    ("model", "options", "holds"),
    [
        (lambda: quantised(8), {}, True),
        (lambda: quantised(4), {}, False),
        (TinyPipeline, {"pipe_args": {"guidance_scale": 4.0}}, True),
        (TinyPipeline, {"pipe_args": {"guidance_scale": 24.0}}, False),
        (Adaptable, {"lora": "small"}, True),
        (Adaptable, {"lora": "large"}, False),
    ],
)
def test_a_shift_is_caught_where_it_breaks_the_promise_and_only_there(
    promised, model, options, holds
):
    if "lora" in options:
        options = {"lora": promised.parent / options["lora"]}
    found = audited(promised, model(), **options)
    assert found.holds == holds, found.verdict
    assert found.verdict.startswith("yes, proven anew" if holds else "no: ")


def test_results_of_other_weights_are_not_taken_for_those_of_the_certified_ones(
    pipe, promised
):
    assert audited(promised, pipe).missed == 0
    assert audited(promised, quantised(4)).missed > 0
