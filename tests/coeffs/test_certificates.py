"""Certificates in an entry: what is checked when one is read, and which is the fastest of its tier."""

from dataclasses import replace

import pytest
from coeffs_samples import certificate, sample_entry
from scipy import stats

import coeffs
from coeffs import Plan
from coeffs.describe import described
from coeffs.engines import export_entry
from coeffs.entry.certificates import chance, of_tier
from coeffs.errors import EntryError


def test_an_entry_keeps_its_certificates_through_a_file():
    plan = Plan(schedule="CSCS", forecast="linear")
    entry = replace(
        sample_entry(),
        certificates=(certificate(), certificate(policy="plan", threshold=None, plan=plan)),
    )
    assert coeffs.loads(coeffs.dump(entry)) == entry
    assert "certificates" not in coeffs.dump(sample_entry())


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"tier": "exact"}, "tier without a cache"),
        ({"limits": {}}, "expected limits on some of"),
        ({"limits": {"sharpness": 3.0}}, "expected limits on some of psnr_db"),
        ({"policy": "plan"}, "a plan belongs to the policy plan"),
        ({"threshold": None}, "a threshold to gate"),
        ({"missed": 5}, "5 misses of 100 prompts do not prove the risk"),
        ({"prompts": 40}, "do not prove the risk"),
        ({"risk": 1.2}, "expected 0 to 1"),
    ],
)
def test_a_certificate_that_claims_too_much_is_refused(changed, problem):
    with pytest.raises(EntryError, match=problem):
        certificate(**changed)


def test_the_chance_is_the_binomial_one():
    for missed, prompts, share in (
        (0, 59, 0.05),
        (3, 200, 0.05),
        (40, 1000, 0.05),
        (9, 9, 0.5),
    ):
        assert chance(missed, prompts, share) == pytest.approx(
            stats.binom.cdf(missed, prompts, share)
        )


def test_caches_come_first_and_the_fastest_of_them_by_time_or_else_by_steps():
    slow, fast = certificate(speedup=1.5), certificate(speedup=2.5)
    untimed = certificate(speedup=None, computed_steps=14.0, num_steps=28)
    other = certificate(tier="lossless", speedup=9.0)
    fewer = certificate(policy="fewer_steps", threshold=None, speedup=3.0)
    assert of_tier([slow, fewer, other, fast, untimed], "high") == [
        fast,
        untimed,
        slow,
        fewer,
    ]


def test_the_promise_is_said_in_words():
    assert certificate().promise == (
        "high: PSNR >= 25 dB for 95 % of all prompts by gate at threshold 0.2, 14 of 28 steps (confidence 0.95, "
        "0 of 100 prompts missed it)"
    )


@pytest.mark.parametrize(
    ("engine", "names"),
    [
        (
            "sglang-cache-dit",
            "quality='high' asks for this tier, quality='lossless' for no cache",
        ),
        ("vllm-omni", "quality='high' asks for this tier"),
        ("cache-dit-mask", None),
        ("tensorrt-llm", None),
    ],
)
def test_an_export_carries_the_tier_of_its_setting_and_the_engines_name_for_it(engine, names):
    plan = Plan(schedule="CS" * 14)
    of_plan = certificate(policy="plan", threshold=None, plan=plan)
    entry = sample_entry(
        transformer_class="FluxTransformer2DModel",
        plans=(plan,),
        certificates=(certificate(), of_plan),
    )
    text = export_entry(
        entry, engine, **({} if "dit" in engine else {"threshold": 0.2}), force=True
    )
    promised = of_plan if "dit" in engine else entry.certificates[0]
    assert f"certified, with our runtime: {promised.promise}" in text
    assert text.count("certified,") == 1 and (names or "") in text
    assert ("quality=" in text) == (names is not None)
    if "dit" not in engine:
        assert "certified" not in export_entry(entry, engine, threshold=0.3, force=True)


def test_an_entry_shows_its_certificates():
    entry = sample_entry(certificates=(certificate(),))
    assert "certified: high: PSNR >= 25 dB for 95 % of all prompts" in " ".join(
        described(entry).split()
    )
