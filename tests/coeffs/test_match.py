"""The entry for a loaded pipeline: the best one, with all that differs; copies and ambiguity are never hidden."""

import pytest
from coeffs_samples import sample_entry

import coeffs
from coeffs.errors import AmbiguousEntry, EntryError, EntryMismatch, EntryNotFound
from coeffs.match import compare

FACTS = {
    "transformer_class": "LongCatImageTransformer2DModel",
    "pipeline_class": "LongCatImagePipeline",
    "checkpoint": "meituan-longcat/LongCat-Image",
    "revision": "abc123",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
    "steps": 28,
    "guidance": 4.5,
    "size": (1024, 1024),
    "dtype": "torch.bfloat16",
}


@pytest.fixture
def registry(tmp_path):
    folder = tmp_path / "registry"
    coeffs.publish(sample_entry(), folder)
    return folder


def test_a_pipeline_as_measured_matches_without_remark(registry):
    match = coeffs.find(FACTS, registry)
    assert (match.entry.label, match.mismatches, match.unknown) == (
        "longcat-image@v1",
        (),
        (),
    )
    assert "vllm-omni/longcat-image@v1" in match.others
    assert coeffs.find(FACTS, registry, strict=True).entry is not None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"steps": 50}, "num_steps: 28 in the entry, 50 here"),
        (
            {"scheduler": "UniPCMultistepScheduler"},
            "scheduler: FlowMatchEulerDiscreteScheduler in the entry",
        ),
        ({"guidance": 1.0}, "guidance_scale: 4.5 in the entry, 1.0 here"),
        ({"size": (512, 1024)}, "height: 1024 in the entry, 512 here"),
        ({"dtype": "float16"}, "dtype: bfloat16 in the entry, float16 here"),
        ({"quantization": "fp8"}, "quantization: none in the entry, fp8 here"),
        ({"lora": "turbo"}, "lora: none in the entry, turbo here"),
        ({"revision": "def456"}, "revision: abc123 in the entry, def456 here"),
        (
            {"pipeline_class": "LongCatImageEditPipeline"},
            "pipeline_class: LongCatImagePipeline in the entry",
        ),
    ],
)
def test_every_difference_is_listed_and_strict_refuses_it(registry, changed, said):
    facts = FACTS | changed
    match = coeffs.find(facts, registry)
    assert [mismatch for mismatch in match.mismatches if said in mismatch]
    assert said in str(match)
    with pytest.raises(EntryMismatch, match="was not measured like this"):
        coeffs.find(facts, registry, strict=True)


def test_what_is_not_known_of_the_pipeline_is_no_difference(registry):
    coeffs.publish(
        sample_entry(model="only-one", transformer_class="OnlyOneTransformer"), registry
    )
    match = coeffs.find({"transformer_class": "OnlyOneTransformer"}, registry)
    assert match.entry.label == "only-one@v1"
    assert match.mismatches == ()


def test_what_the_entry_does_not_state_is_said(registry):
    match = coeffs.find(FACTS | {"shift": 3.0, "num_frames": 1}, registry)
    assert match.unknown == ("shift", "num_frames")


@pytest.mark.parametrize(
    "checkpoint",
    [
        "/models/LongCat-Image",
        "other/longcat-image-diffusers",
        r"C:\models\LongCat-Image",
        "/c/hub/models--meituan-longcat--LongCat-Image/snapshots/0a1b",
    ],
)
def test_a_local_copy_of_the_checkpoint_is_the_same(registry, checkpoint):
    assert coeffs.find(FACTS | {"checkpoint": checkpoint}, registry).mismatches == ()


def test_another_checkpoint_of_the_class_is_never_served():
    """Wan's numbers shipped as FLUX's because a class was taken for a model."""
    facts = {
        "transformer_class": "FluxTransformer2DModel",
        "checkpoint": "someone/my-flux-finetune",
    }
    with pytest.raises(EntryNotFound, match="entries of other checkpoints"):
        coeffs.find(facts)


def test_an_unknown_class_says_how_to_measure_it():
    with pytest.raises(EntryNotFound, match="measure one with `calibrate --model"):
        coeffs.find({"transformer_class": "NoSuchTransformer"})


def test_copied_numbers_are_only_used_by_name():
    with pytest.raises(
        AmbiguousEntry,
        match=r"alivilab/consisid@v1 \(copied from alivilab/cogvideox-5b\); name one",
    ):
        coeffs.find({"transformer_class": "ConsisIDTransformer3DModel"})


def test_published_sets_that_fit_equally_well_are_not_chosen_between():
    facts = {
        "transformer_class": "FluxTransformer2DModel",
        "checkpoint": "black-forest-labs/FLUX.1-dev",
        "steps": 28,
    }
    with pytest.raises(
        AmbiguousEntry, match=r"2 sets fit .* alivilab/flux1-dev, issue20/flux1-dev-refit"
    ):
        coeffs.find(facts)


def test_a_published_set_is_served_where_it_is_the_only_one():
    match = coeffs.find(
        {
            "transformer_class": "MochiTransformer3DModel",
            "checkpoint": "genmo/mochi-1-preview",
            "steps": 64,
        }
    )
    assert (match.entry.label, match.unknown) == ("alivilab/mochi-1@v1", ("num_steps",))


def test_an_own_measurement_comes_before_published_sets_and_the_newest_version_first(
    registry,
):
    coeffs.publish(sample_entry(notes="again"), registry)
    assert coeffs.find(FACTS | {"steps": 50}, registry).entry.label == "longcat-image@v2"


def test_the_version_that_was_measured_like_this_comes_first(registry):
    coeffs.publish(sample_entry(protocol={"num_steps": 50, "dtype": "bfloat16"}), registry)
    assert coeffs.find(FACTS, registry).entry.version == 1


def test_the_version_for_this_number_of_steps_comes_first_whatever_else_differs(registry):
    few = sample_entry(protocol={"num_steps": 14, "guidance_scale": 7.0, "dtype": "float16"})
    coeffs.publish(few, registry)
    assert coeffs.find(FACTS, registry).entry.version == 1
    assert coeffs.find(FACTS | {"steps": 14}, registry).entry.version == 2
    unknown = {name: value for name, value in FACTS.items() if name != "steps"}
    assert coeffs.find(unknown, registry).entry.version == 1


def test_two_measurements_under_two_names_are_said(registry):
    coeffs.publish(sample_entry(model="other-name"), registry)
    with pytest.raises(AmbiguousEntry, match="2 sets fit"):
        coeffs.find(FACTS, registry)


def test_facts_are_checked():
    with pytest.raises(EntryError, match="facts: unknown stepz; expected transformer_class"):
        coeffs.find({"transformer_class": "X", "stepz": 3})
    with pytest.raises(EntryError, match="transformer_class is missing"):
        coeffs.find({"steps": 3})


def test_comparison_with_a_named_entry():
    mismatches, unknown = compare(
        coeffs.load("mlx-teacache/qwen-image@v1"),
        {
            "transformer_class": "QwenImageTransformer2DModel",
            "checkpoint": "Qwen/Qwen-Image-Edit",
            "steps": 50,
            "dtype": "bfloat16",
        },
    )
    assert [mismatch.partition(":")[0] for mismatch in mismatches] == [
        "checkpoint",
        "num_steps",
    ]
    assert unknown == ("dtype",)
