"""Synthetic logs with known truth, and run folders made of them."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

import coeffs
from calibrate.runs.files import PAIR_COLUMNS, encode_pairs

TRUTH = (2.0, -0.3, 0.5, 0.02)  # highest power first, on x in about [0.02, 0.3]


def make_frame(
    prompts=8,
    seeds=1,
    steps=20,
    branches=("cond", "uncond"),
    experts=("transformer",),
    noise=0.003,
    seed=0,
    truth=TRUTH,
) -> pd.DataFrame:
    """Pairs whose y is a known polynomial of x plus noise and an effect of the prompt; uncond is 1.5 times cond."""
    random, rows = np.random.default_rng(seed), []
    for prompt in range(prompts):
        effect = random.normal(0, noise)
        for number in range(seeds):
            for expert in experts:
                base = 0.04 + 0.2 * np.linspace(-1, 1, steps - 1) ** 2
                x = np.clip(base * np.exp(random.normal(0, 0.15, steps - 1)), 0.02, 0.3)
                for branch in branches:
                    scale = 1.5 if branch == "uncond" else 1.0
                    y = (
                        scale * np.polyval(truth, x)
                        + effect
                        + random.normal(0, noise, steps - 1)
                    )
                    for step in range(1, steps):
                        rows.append({
                            "prompt_id": f"p{prompt:02d}", "seed": number, "branch": branch, "expert": expert,
                            "step": step, "num_steps": steps, "timestep": 1000 * (1 - step / steps),
                            "sigma": 1 - step / steps, "x": x[step - 1], "x_time_embedding": 0.1 + 0.01 * step,
                            "y_output": y[step - 1], "y_hidden": 0.5 * y[step - 1], "y_residual": 2 * y[step - 1] ** 2,
                            "mag_ratio": 1 - 0.01 * step, "mag_ratio_std": 0.01, "cos_distance": 0.001,
                        })  # fmt: skip
    return pd.DataFrame(rows, columns=PAIR_COLUMNS)


def make_entry(run, polynomial, status="measured", **window) -> coeffs.Entry:
    """An entry that gates every expert and branch of a run with one polynomial."""
    domain, fit = polynomial.domain, {}
    fit["pooled"] = coeffs.Fit(
        coefficients_high_to_low=polynomial.coefficients_high_to_low, domain=domain
    )
    expert = coeffs.Expert(recommended="pooled", branches=fit)
    return coeffs.Entry(
        model="a-model", status=status, signal="modulated_input", target="output",
        sign_rule=polynomial.sign_rule, experts=dict.fromkeys(run.experts, expert), **window,
    )  # fmt: skip


def make_run(path: Path, frame: pd.DataFrame, **manifest) -> Path:
    """A run folder as the recorder writes it."""
    for folder in ("pairs", "timing"):
        (path / folder).mkdir(parents=True, exist_ok=True)
    for index, ((prompt, seed), rows) in enumerate(frame.groupby(["prompt_id", "seed"])):
        name = f"{index:05d}-{prompt}-{seed}"
        (path / "pairs" / f"{name}.parquet").write_bytes(
            encode_pairs(rows.to_dict("records"))
        )
        experts = rows["expert"].unique()
        timing = {
            expert: {"call_seconds": 0.5, "stack_seconds": 0.4, "calls": 40}
            for expert in experts
        }
        (path / "timing" / f"{name}.json").write_text(json.dumps(timing))
    prompts = frame[["prompt_id", "seed"]].drop_duplicates().to_dict("records")
    content = {
        "run_id": "0123abcd", "model": "some-model", "transformer_classes": {"transformer": "SomeTransformer2DModel"},
        "pipeline_class": "SomePipeline", "checkpoint": {"repository": "some/model"}, "device": "cpu",
        "protocol": {"num_steps": int(frame["num_steps"].iloc[0]), "guidance_scale": 4.5, "height": 32, "width": 32},
        "protocol_sha256": "0" * 64, "versions": {"teacal": "0.1.0", "torch": "2.13.0"},
        "prompts": [{"prompt": "a text", **row} for row in prompts],
    }  # fmt: skip
    (path / "run.yaml").write_text(yaml.safe_dump(content | manifest))
    return path
