"""Thresholds for a number of computed steps, and the published sets that are tuned beside the own gate."""

import pytest

import coeffs
from calibrate.verifying.tuning import published_entries, tune_threshold


def test_tuning_corrects_what_replay_gets_wrong():
    calls = []

    def measured(threshold):
        calls.append(threshold)
        return 20 / (1 + threshold) + 2  # real runs compute two steps more than the replay says

    threshold, computed = tune_threshold(lambda t: 20 / (1 + t), measured, 10)
    assert computed == pytest.approx(10, abs=0.5) and threshold == pytest.approx(1.5, abs=0.2)
    assert len(calls) <= 3


def test_published_sets_of_the_class_enter_once_per_shape():
    own = coeffs.load("vllm-omni/longcat-image")
    found = published_entries(coeffs.entries(), "LongCatImageTransformer2DModel", own)
    assert found and all(
        entry.transformer_class == "LongCatImageTransformer2DModel" for entry in found
    )
    assert own.label not in {entry.label for entry in found}
