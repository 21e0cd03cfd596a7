"""The table of models: every row fits the pipeline class that diffusers has."""

import inspect

import pytest

from calibrate.model.call import prepare_call
from calibrate.model.prompts import shipped_sets
from calibrate.model.table import class_defaults, find_model, model_table

WANTED = [
    *(
        "tiny-longcat-image",
        "LongCat-Image",
        "LongCat-Image-Edit",
        "Qwen-Image",
        "Qwen-Image-Edit",
        "Z-Image",
    ),
    *(
        "FLUX.1-dev",
        "FLUX.2-dev",
        "Wan2.1-T2V-1.3B",
        "Wan2.1-T2V-14B",
        "Wan2.2-T2V-A14B",
        "HunyuanVideo",
    ),
    "stable-audio-open-1.0",
]


def test_the_promised_names_are_there_whatever_the_case():
    for name in WANTED:
        assert find_model(name.upper()).alias == name
    assert find_model("qwen/qwen-image").alias == "Qwen-Image"
    assert find_model("no-such-model") is None


def test_names_and_repositories_are_unique():
    slugs = [spec.slug for spec in model_table()]
    repositories = [spec.repository for spec in model_table() if spec.repository]
    assert len(set(slugs)) == len(slugs) and len(set(repositories)) == len(repositories)


@pytest.mark.parametrize("spec", model_table(), ids=lambda spec: spec.alias)
def test_row_fits_its_pipeline(spec):
    import diffusers

    call = getattr(diffusers, spec.pipeline_class).__call__
    parameters = set(inspect.signature(call).parameters)
    prepared = prepare_call(call, spec)
    assert set(prepared.arguments) <= parameters
    for name in ("height", "width", "num_frames", "num_steps", "guidance_scale"):
        value = getattr(spec, name)
        assert value is None or prepared.protocol[name] == value, f"{name} would be left out"
    assert set(spec.call_arguments) <= parameters
    assert prepared.protocol["num_steps"] >= 2
    assert spec.prompts in shipped_sets() and spec.kind in {"image", "video", "audio"}
    assert spec.needs_image <= ("image" in parameters)
    assert (spec.repository is None) != (spec.embedded is None)
    assert spec.repository is None or spec.repository.count("/") == 1


def test_any_checkpoint_of_a_class_gets_what_the_class_needs_and_no_sizes():
    """A finetune of LongCat-Image in a local folder must not have its prompt rewritten."""
    spec = class_defaults("LongCatImagePipeline")
    assert spec.call_arguments == {"enable_prompt_rewrite": False}
    assert spec.height is spec.num_steps is None and spec.prompts == "default"
    assert class_defaults("NoSuchPipeline") is None
