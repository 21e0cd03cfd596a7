"""Entries that the registry's tests share, and the proof that the measured one would pass its release checks."""

import dataclasses

import coeffs
from coeffs.release import entry_problems


def sample_entry(**changes: object) -> coeffs.Entry:
    """A measured entry: rising and positive on its domain, two branches, ratios, a plan, two thresholds."""
    cond = coeffs.Fit(
        coefficients_high_to_low=(0.5, -0.25, 1.0 / 3.0, 0.125),
        domain=(0.01, 0.4),
        counts={"prompts": 70, "trajectories": 70, "pairs": 1890, "excluded_non_finite": 0},
        figures={"r2": 0.81, "r2_held_out": 0.78, "rmse_held_out": 1.5e-05},
        intervals={"coefficients": [(0.4, 0.6), (-0.3, -0.2), (0.3, 0.4), (0.12, 0.13)]},
    )
    uncond = dataclasses.replace(
        cond,
        coefficients_high_to_low=(0.25, 0.0625),
        degree=None,
        value_at_0p1=None,
        intervals=None,
    )
    expert = coeffs.Expert(
        recommended="cond",
        branches={"cond": cond, "uncond": uncond},
        mag_ratios={"cond": (1.0, 1.25, 0.9375, 0.9), "uncond": (1.0, 1.1, 0.95, 0.85)},
    )
    facts: dict = {
        "model": "longcat-image",
        "status": "measured",
        "transformer_class": "LongCatImageTransformer2DModel",
        "pipeline_class": "LongCatImagePipeline",
        "checkpoint": {"repository": "meituan-longcat/LongCat-Image", "revision": "abc123"},
        "signal": "modulated_input",
        "target": "output",
        "protocol": {
            "scheduler": "FlowMatchEulerDiscreteScheduler",
            "num_steps": 28,
            "guidance_scale": 4.5,
            "height": 1024,
            "width": 1024,
            "dtype": "bfloat16",
            "call_arguments": {"enable_prompt_rewrite": False, "note": "no", "empty": None},
        },
        "experts": {"transformer": expert},
        "max_skips": 4,
        "thresholds": (
            {
                "threshold": 0.2,
                "computed_steps": 14.5,
                "num_steps": 28,
                "speedup": 1.8,
                "psnr_db": 30.25,
                "kind": "verified",
            },
            {"threshold": 0.3, "computed_steps": 10, "num_steps": 28, "kind": "replay"},
        ),
        "plans": ({"schedule": "CCSC", "sigmas": [1.0, 0.75, 0.5, 0.25]},),
        "warnings": (
            "1.10",
            "a: b # c",
            "日本 \U0001f600 \x07 \u2028 'quote' \"double\" \\",
        ),
        "notes": "line one\nline two",
        "source": {
            "run_id": "0123abcd",
            "log_sha256": "0" * 64,
            "created": "2026-11-21T00:00:00Z",
        },
    }
    return coeffs.Entry(**facts | changes)


def two_experts(**changes: object) -> coeffs.Entry:
    """A two-expert entry without branches of guidance, as for Wan 2.2."""
    experts = {
        name: {
            "recommended": "pooled",
            "branches": {
                "pooled": {"coefficients_high_to_low": values, "domain": (0.0, 0.5)}
            },
        }
        for name, values in {
            "transformer": (0.5, 0.25),
            "transformer_2": (0.75, 0.0, 0.125),
        }.items()
    }
    facts = {
        "model": "wan2.2",
        "transformer_class": "WanTransformer3DModel",
        "experts": experts,
        "max_skips": None,
    }
    return sample_entry(**facts | changes)


def test_the_sample_is_fit_for_release():
    assert entry_problems(sample_entry()) == []


def certificate(**changes: object) -> coeffs.Certificate:
    """The gate of the sample entry, certified for the tier ``high``."""
    facts: dict = {
        "tier": "high",
        "policy": "gate",
        "threshold": 0.2,
        "limits": {"psnr_db": 25.0},
        "risk": 0.05,
        "confidence": 0.95,
        "tests": 1,
        "prompts": 100,
        "missed": 0,
        "prompt_set": "held-out.txt",
        "prompts_sha256": "0" * 64,
        "computed_steps": 14.0,
        "num_steps": 28,
        "speedup": 1.8,
        "protocol": coeffs.Protocol(
            scheduler="FlowMatchEulerDiscreteScheduler", num_steps=28, dtype="bfloat16"
        ),
    }
    return coeffs.Certificate(**facts | changes)
