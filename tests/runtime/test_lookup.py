"""The automatic look-up once a generation shows its number of steps: calibrations live together."""

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from diffusers import LongCatImagePipeline

import coeffs
from coeffs import store
from runtime import apply_tea_cache

torch.set_num_threads(1)
FOLDER = Path(__file__).parents[2] / "calibrate" / "embedded" / "tiny-longcat-image"
SHIPPED = coeffs.load("tiny-longcat-image").label


@pytest.fixture(scope="module")
def pipe():
    pipeline = LongCatImagePipeline.from_pretrained(FOLDER, dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def ten_steps(tmp_path, monkeypatch):
    """The shipped entry as a version 2 that was measured at 10 steps."""
    entry = coeffs.load(SHIPPED)
    protocol = dataclasses.replace(entry.protocol, num_steps=10)
    published = coeffs.publish(
        dataclasses.replace(entry, protocol=protocol), tmp_path / "registry"
    )
    monkeypatch.setenv(store.ENVIRONMENT, str(tmp_path / "registry"))
    return coeffs.load(published).label


def generate(pipe, steps: int) -> None:
    pipe(
        "the digit seven",
        height=32,
        width=32,
        num_inference_steps=steps,
        enable_prompt_rewrite=False,
        output_type="latent",
    )


def test_each_generation_takes_the_entry_for_its_number_of_steps(pipe, ten_steps, caplog):
    with apply_tea_cache(pipe, threshold=0.1) as cache, caplog.at_level(logging.WARNING):
        for steps, expected in ((28, SHIPPED), (10, ten_steps), (28, SHIPPED)):
            generate(pipe, steps)
            assert cache.settings["entry"] == expected
        assert not [text for text in cache.mismatches if "num_steps" in text]
        assert "num_steps" not in caplog.text


def test_a_number_of_steps_that_nobody_measured_is_a_logged_warning(pipe, ten_steps, caplog):
    with apply_tea_cache(pipe, threshold=0.1) as cache, caplog.at_level(logging.WARNING):
        generate(pipe, 6)
    assert [text for text in cache.mismatches if text.endswith("in the entry, 6 here")]
    assert "in the entry, 6 here" in caplog.text


def test_a_named_entry_stays(pipe, ten_steps):
    with apply_tea_cache(pipe, SHIPPED, threshold=0.1) as cache:
        generate(pipe, 10)
        assert cache.settings["entry"] == SHIPPED
        assert "num_steps: 28 in the entry, 10 here" in cache.mismatches
