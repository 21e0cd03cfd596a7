"""Whole verifications of real pipelines that make other things than an image from a text, or with other parts."""

import re
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import pandas as pd
import pytest
import tiny_pipelines
import torch
from PIL import Image

import coeffs
from calibrate.fitting.draft import fit as draft_entry
from calibrate.recording.record import record
from calibrate.reporting.report import report
from calibrate.reporting.run_data import load_findings
from calibrate.runs.pairs import load_run
from calibrate.verifying.lineup import FEWER_STEPS, FEWER_STEPS_2, GATE, UNIFORM
from calibrate.verifying.verify import verify

pytestmark = pytest.mark.slow

STEPS = 6
POLICIES = ("gate", "uniform", "uniform-fitted", "fewer-steps", "fewer-steps-2")
FITTED = "uniform skipping, fitted guided"


@dataclass
class Kind:
    """A pipeline with a text encoder of its own making, and how it is called.

    Attributes:
        options: Of :func:`calibrate.record`.
        media: Shape of what one generation makes.
        branch: The one whose decisions are looked at.
        measure: What it is judged by.
        refused: Why the second-order solver is no comparison.
    """

    pipe: Any
    options: dict[str, Any]
    media: tuple[int, ...]
    branch: str = "cond"
    experts: tuple[str, ...] = ("transformer",)
    measure: str = "psnr_db"
    refused: str = ""
    images: list = field(default_factory=list)


def words(prompt: Any, *shape: int) -> torch.Tensor:
    """An embedding of its own for every text."""
    text = prompt if isinstance(prompt, str) else prompt[0]
    return tiny_pipelines.embeds(1, *shape, seed=sum(map(ord, text)))


def with_video_decoder(case: tiny_pipelines.Case) -> Any:
    """Wan's pipeline with an autoencoder and with texts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        channels = case.transformer.config.in_channels
        vae = diffusers.AutoencoderKLWan(
            base_dim=4,
            z_dim=channels,
            num_res_blocks=1,
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
        ).eval()
    components = {**case.pipe.components, "vae": vae}
    pipe = diffusers.WanPipeline(**components, boundary_ratio=case.pipe.config.boundary_ratio)
    pipe.encode_prompt = lambda prompt, negative_prompt=None, **_: (
        words(prompt, 9, 16),
        words("", 9, 16),
    )
    return tiny_pipelines.quiet(pipe)


VIDEO = dict(height=64, width=64, num_frames=5, guidance_scale=3.0)
SECOND_ORDER = "UniPCMultistepScheduler is of order 2 already"


def video(tmp_path) -> Kind:
    return Kind(
        with_video_decoder(tiny_pipelines.wan21()),
        VIDEO,
        (5, 64, 64, 3),
        refused=SECOND_ORDER,
    )


def two_experts(tmp_path) -> Kind:
    experts = ("transformer", "transformer_2")
    return Kind(
        with_video_decoder(tiny_pipelines.wan22()),
        VIDEO,
        (5, 64, 64, 3),
        experts=experts,
        refused=SECOND_ORDER,
    )


def audio(tmp_path) -> Kind:
    pipe = tiny_pipelines.stable_audio().pipe
    pipe.encode_prompt = lambda prompt, *_: words(prompt, 3, 4)
    options = dict(guidance_scale=3.0, pipe_args={"audio_end_in_s": 2.0})
    refused = "EDMDPMSolverMultistepScheduler is of order 2 already"
    return Kind(pipe, options, (2, 32), "branch0", measure="snr_db", refused=refused)


def edit(tmp_path) -> Kind:
    pipe = tiny_pipelines.qwen_image_edit_plus().pipe
    pipe.encode_prompt = lambda prompt, image, **_: (
        words(prompt, 7, 16) + float(np.mean(image[0])) / 255,
        None,
    )
    Image.new("RGB", (32, 32), (200, 30, 90)).save(tmp_path / "red.png")
    options = dict(
        height=16, width=16, guidance_scale=3.0, pipe_args={"negative_prompt": " "}
    )
    return Kind(pipe, options, (16, 16, 3), images=[tmp_path / "red.png"])


@pytest.mark.parametrize("build", [video, two_experts, audio, edit])
def test_a_verification_from_recording_to_findings(build, tmp_path):
    kind = build(tmp_path)
    folder = tmp_path / "run"
    record(
        kind.pipe, prompts=["a red cube", "two seas"], steps=STEPS, out=folder, progress=False, images=kind.images,
        gram=True, **kind.options,
    )  # fmt: skip
    coeffs.save(draft_entry(load_run(folder), degree=1), folder / "entry.yaml")
    found = verify(
        folder, model=kind.pipe, prompts=["an old map", "a bell"], budgets=[4, 3], policies=POLICIES, progress=False,
        images=kind.images,
    )  # fmt: skip

    rows, cached = found.results, found.results["policy"].isin([GATE, UNIFORM, FITTED])
    assert (
        kind.refused in found.facts["refused"].pop(FEWER_STEPS_2, "")
        and found.facts["refused"] == {}
    )
    assert set(rows["policy"]) == {GATE, UNIFORM, FITTED, FEWER_STEPS} | (
        set() if kind.refused else {FEWER_STEPS_2}
    )
    assert (
        found.facts["floor"]["identical"]
        and not rows["broken"].any()
        and rows["prompt_id"].nunique() == 2
    )
    assert (
        set(found.summary["measure"]) == {kind.measure}
        and np.isfinite(rows[kind.measure]).all()
    )
    with np.load(next((folder / "verify" / "reference").glob("*.npz"))) as kept:
        assert kept["media0"].shape == kind.media and kept["latents"].size
    assert (
        np.isfinite(rows["latent_rel_l2"]).all()
        and (rows.loc[cached, "latent_rel_l2"] > 0).all()
    )
    for row in rows[cached].itertuples():
        patterns = [row.patterns[f"{expert}/{kind.branch}"] for expert in kind.experts]
        assert sum(map(len, patterns)) == STEPS and all(
            pattern.startswith("C") for pattern in patterns
        )
        assert row.computed_steps == "".join(patterns).count("C") < STEPS
        assert (
            row.policy != FITTED or row.computed_steps == row.budget
        )  # each expert's first step is in the schedule
    verified = [
        row for row in coeffs.load(folder / "entry.yaml").thresholds if row.kind == "verified"
    ]
    assert verified and all(np.isfinite(row.speedup) for row in verified)
    # The page depends on which run was faster: on a busy machine a tiny model's cached run may not be.
    timed = pd.read_parquet(folder / "verify" / "results.parquet")
    timed.assign(uncached_seconds=2 * timed["seconds"]).to_parquet(
        folder / "verify" / "results.parquet"
    )
    page = report(folder).read_text(encoding="utf-8")
    text = _words(page)
    advice = load_findings(folder).advice
    assert advice.use in text and advice.certainty in text
    assert " nan" not in text.lower() and "- to -" not in text
    assert (page.count('class="compare"') == 0) == (kind.measure == "snr_db")


def _words(page: str) -> str:
    """What the page says, without marks and drawings."""
    return re.sub(
        r"<[^>]*>", " ", re.sub(r"<(svg|style|script).*?</\1>", "", page, flags=re.DOTALL)
    )
