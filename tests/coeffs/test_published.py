"""The published sets as facts: how many, whose, on which signal, and that copies have the numbers of the original."""

import pytest

import coeffs
from coeffs import release

PUBLISHED = [entry for entry in coeffs.entries() if entry.status != "measured"]
FITTED = [entry for entry in PUBLISHED if entry.signal != "none"]
RATIOS = [entry for entry in PUBLISHED if entry.signal == "none"]
IDS = [entry.label for entry in PUBLISHED]
MODELS = [entry.model for entry in PUBLISHED]
ENGINE_RULES = {"vllm-omni": "abs", "tensorrt-llm": "abs", "mlx-teacache": "clamp"}


def test_there_are_75_sets_of_coefficients_and_6_of_ratios():
    assert (len(FITTED), len(RATIOS)) == (75, 6)
    assert sum(entry.status == "copied" for entry in PUBLISHED) == 17


@pytest.mark.parametrize("entry", PUBLISHED, ids=IDS)
def test_a_set_states_its_origin(entry):
    assert "/" in entry.model
    assert entry.engine and entry.title and entry.transformer_class
    assert entry.source.reference and entry.source.url.startswith("https://github.com/")
    assert (
        "Numbers: checked against" in entry.notes
        or "Numbers: could not be checked" in entry.notes
    )
    assert entry.signal != "other" or entry.signal_note
    assert all(row.kind == "reported" for row in entry.thresholds)
    assert not [problem for problem in release.entry_problems(entry) if problem.fatal]


def test_what_could_not_be_checked_is_known():
    unchecked = [entry.model for entry in PUBLISHED if "could not be checked" in entry.notes]
    assert unchecked == ["vllm-omni/minimax-h3-ref2va"]


COPIES = [entry for entry in PUBLISHED if entry.copied_from in MODELS]


@pytest.mark.parametrize("entry", COPIES, ids=lambda entry: entry.model)
def test_a_copy_has_the_numbers_of_what_it_was_copied_from(entry):
    original = coeffs.load(entry.copied_from)
    assert original.status == "published"
    assert entry.fit().coefficients_high_to_low == pytest.approx(
        original.fit().coefficients_high_to_low, rel=1e-9
    )
    if (
        original.title != entry.title
        and original.transformer_class != entry.transformer_class
    ):
        assert any("another model" in warning for warning in entry.warnings)


def test_the_digits_that_one_copy_has_too_many_are_kept():
    """mlx-teacache writes 498.651651244 where upstream has 498.651651: a fact, not ours to mend."""
    assert (
        coeffs.load("mlx-teacache/flux1-dev").fit().coefficients_high_to_low[0]
        == 498.651651244
    )
    assert coeffs.load("alivilab/flux1-dev").fit().coefficients_high_to_low[0] == 498.651651


@pytest.mark.parametrize("entry", FITTED, ids=lambda entry: entry.label)
def test_the_sign_rule_is_the_one_of_the_engine(entry):
    expected = (
        "abs"
        if entry.model == "comfyui/flux-kontext"
        else ENGINE_RULES.get(entry.engine, "signed")
    )
    assert entry.sign_rule == expected


def test_a_new_version_keeps_or_replaces_the_numbers():
    """v1 of Qwen-Image had the threshold of a later fit beside the coefficients of an earlier one."""
    for name in ("flux2-klein-base-4b", "z-image-base"):
        first, second = (
            coeffs.load(f"mlx-teacache/{name}@v{version}").fit() for version in (1, 2)
        )
        assert first.coefficients_high_to_low == second.coefficients_high_to_low
        assert first.domain is None and second.domain is not None
    first, second = (coeffs.load(f"mlx-teacache/qwen-image@v{version}") for version in (1, 2))
    assert first.fit().coefficients_high_to_low != second.fit().coefficients_high_to_low
    assert second.fit().domain == (0.04675976472922664, 0.587799896108221)


@pytest.mark.parametrize("entry", RATIOS, ids=lambda entry: entry.label)
def test_ratios_are_one_per_step_from_1(entry):
    (expert,) = entry.experts.values()
    assert not expert.branches
    for ratios in expert.mag_ratios.values():
        assert len(ratios) == entry.protocol.num_steps and ratios[0] == 1.0
        assert all(0.5 < ratio < 1.5 for ratio in ratios)


def test_two_engines_contradict_each_other_on_flux():
    ours, theirs = (
        coeffs.load(f"{engine}/flux1-mag") for engine in ("diffusers", "vllm-omni")
    )
    assert ours.experts["transformer"].mag_ratios != theirs.experts["transformer"].mag_ratios
    assert all("different ratios" in entry.warnings[0] for entry in (ours, theirs))


@pytest.mark.parametrize(
    ("model", "signal"),
    [
        ("alivilab/flux1-dev", "modulated_input"),
        ("alivilab/wan2.1-t2v-1.3b", "time_embedding"),
        ("alivilab/wan2.1-t2v-1.3b-ret", "time_embedding"),
        ("alivilab/cogvideox-5b", "time_embedding"),
        ("alivilab/hidream-i1-full", "time_embedding"),
        ("comfyui/lumina_2", "time_embedding"),
        ("trtllm/qwen-image", "time_embedding"),
        ("vllm-omni/hunyuanimage3", "time_embedding"),
        ("lightx2v/wan2.2-ti2v-5b", "time_embedding"),
        ("comfyui/hidream-i1-dev", "other"),
        ("mlx-teacache/z-image-base", "other"),
    ],
)
def test_a_set_keeps_the_signal_it_was_fitted_on(model, signal):
    assert coeffs.load(model).signal == signal


def test_facts_that_everybody_quotes():
    longcat = coeffs.load("vllm-omni/longcat-image").fit()
    assert longcat.coefficients_high_to_low == (
        652.598,
        -424.1615,
        84.5526,
        -4.5923,
        0.1694,
    )
    flux = coeffs.load("alivilab/flux1-dev")
    assert [(row.threshold, row.speedup) for row in flux.thresholds] == [
        (0.25, 1.5),
        (0.4, 1.8),
        (0.6, 2.0),
        (0.8, 2.25),
    ]
    assert coeffs.load("vllm-omni/minimax-h3-fl2va").fit().domain == (0.010979, 0.159318)
    assert sum(entry.fit().domain is not None for entry in FITTED) == 7
