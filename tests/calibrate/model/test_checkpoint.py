"""From a name to a checkpoint: what is found, what is refused, and that nothing from a checkpoint is ever run."""

import dataclasses
import json
import os
import shutil

import coeffs_samples
import pytest
import tiny_pipelines
import torch
from safetensors.torch import save_file

import coeffs
from calibrate.errors import (
    CalibrateError,
    InvalidCheckpoint,
    InvalidOption,
    ModelNotFound,
    UnsafeCheckpoint,
)
from calibrate.model.checkpoint import (
    find_checkpoint,
    pipeline_class_of,
    slug_of,
    weights_sha256,
)
from calibrate.model.loading import load_pipeline, pick_device
from calibrate.model.table import find_model

INDEX = {
    "_class_name": "LongCatImagePipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "transformer": ["diffusers", "LongCatImageTransformer2DModel"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "image_encoder": [None, None],
}


@pytest.fixture
def folder(tmp_path):
    """The outside of a checkpoint; nothing in it can be loaded."""
    path = tmp_path / "My Model"
    write_index(path, INDEX)
    (path / "transformer").mkdir()
    save_file(
        {"w": torch.zeros(2)}, path / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    (path / "transformer" / "config.json").write_text("{}")
    return path


def write_index(path, index):
    path.mkdir(exist_ok=True)
    (path / "model_index.json").write_text(
        index if isinstance(index, str) else json.dumps(index)
    )


def test_embedded_model_is_found_by_name_and_loads():
    checkpoint = find_checkpoint("Tiny-LongCat-Image")
    assert checkpoint.slug == checkpoint.repository == "tiny-longcat-image"
    assert (
        checkpoint.pipeline_class == "LongCatImagePipeline"
        and len(checkpoint.as_dict()["sha256"]) == 64
    )
    pipeline = load_pipeline(checkpoint, device="cpu")
    assert type(pipeline) is pipeline_class_of(checkpoint)
    assert pipeline.dtype == torch.bfloat16 and pipeline.device.type == "cpu"


def test_folder_is_found_and_named_without_its_path(folder):
    checkpoint = find_checkpoint(folder)
    assert (checkpoint.repository, checkpoint.slug, checkpoint.revision) == (
        "My Model",
        "my-model",
        None,
    )
    assert str(folder.parent) not in json.dumps(checkpoint.as_dict())
    assert checkpoint.spec.call_arguments == {"enable_prompt_rewrite": False}


def test_other_weights_have_another_hash(folder):
    before = weights_sha256(folder)
    save_file(
        {"w": torch.ones(2)}, folder / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    assert weights_sha256(folder) != before


@pytest.mark.parametrize(
    "name",
    ["no-such-model", "./nowhere", "a/b/c", "../x", "meituan-longcat/", "-x/y", "a b/c"],
)
def test_unknown_name_says_what_was_tried_and_what_there_is(name):
    with pytest.raises(
        ModelNotFound, match=r"tried the embedded models, a folder here.*LongCat-Image"
    ) as caught:
        find_checkpoint(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["LongCat-Image", "someone/no-such-model"])
def test_unreachable_hub_is_one_line_with_the_next_step(name):
    """The tests run offline, so that this is what everybody without a connection sees."""
    with pytest.raises(
        ModelNotFound, match=r"tried .*the local cache and the hub .*Check the name"
    ) as caught:
        find_checkpoint(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("index", "error", "said"),
    [
        (None, InvalidCheckpoint, "no model_index.json in it"),
        ("{", InvalidCheckpoint, "cannot be read"),
        ("[]", InvalidCheckpoint, "list found"),
        (
            {**INDEX, "_class_name": ["pipeline", "Evil"]},
            UnsafeCheckpoint,
            "from a Python file",
        ),
        ({}, UnsafeCheckpoint, "from a Python file"),
        (
            {**INDEX, "transformer": ["evil", "Evil"]},
            UnsafeCheckpoint,
            "takes transformer from 'evil'",
        ),
        (
            {**INDEX, "transformer": ["os", "system"]},
            UnsafeCheckpoint,
            "takes transformer from 'os'",
        ),
        ({**INDEX, "transformer": [3, "x"]}, UnsafeCheckpoint, "takes transformer from 3"),
        ({**INDEX, "../x": ["diffusers", "AutoencoderKL"]}, UnsafeCheckpoint, "takes ../x"),
    ],
)
def test_folder_that_is_no_safe_checkpoint_is_refused(folder, index, error, said):
    (folder / "model_index.json").unlink()
    if index is not None:
        write_index(folder, index)
    with pytest.raises(error, match=said) as caught:
        find_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_code_beside_a_component_is_refused_and_not_run(folder):
    (folder / "transformer" / "diffusers.py").write_text(
        f"open({str(folder / 'ran')!r}, 'w')"
    )
    with pytest.raises(UnsafeCheckpoint, match="never run"):
        find_checkpoint(folder)
    assert not (folder / "ran").exists()


def test_remote_code_of_an_auto_class_is_refused(folder):
    write_index(folder, {**INDEX, "text_encoder": ["transformers", "AutoModel"]})
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / "config.json").write_text(
        '{"auto_map": {"AutoModel": "model.Evil"}}'
    )
    with pytest.raises(UnsafeCheckpoint, match="auto_map"):
        find_checkpoint(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.ckpt"])
def test_pickled_weights_are_refused_unless_asked_for_by_name(folder, name):
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/ran'\ntR.")
    with pytest.raises(
        UnsafeCheckpoint, match=rf"text_encoder/{name}: pickled weights .*--allow-pickle"
    ):
        find_checkpoint(folder)
    assert find_checkpoint(folder, allow_pickle=True).slug == "my-model"


def test_pickles_beside_safetensors_are_ignored(folder):
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"")
    assert find_checkpoint(folder).slug == "my-model"


def test_incomplete_folder_is_one_line(folder):
    with pytest.raises(
        InvalidCheckpoint, match="diffusers cannot load it as LongCatImagePipeline"
    ) as caught:
        load_pipeline(find_checkpoint(folder), device="cpu")
    assert "\n" not in str(caught.value)


def test_components_that_were_saved_as_none_are_left_out(tmp_path):
    """Bug: Stable Diffusion 3 saved without its T5 is a whole checkpoint, but diffusers asks for the T5."""
    tiny_pipelines.sd3().pipe.save_pretrained(tmp_path / "sd3")
    pipe = load_pipeline(
        find_checkpoint(str(tmp_path / "sd3")), dtype="float32", device="cpu"
    )
    assert (
        pipe.text_encoder_3 is None
        and type(pipe.transformer).__name__ == "SD3Transformer2DModel"
    )


def test_truncated_weights_are_one_line(tmp_path):
    shutil.copytree(find_checkpoint("tiny-longcat-image").folder, tmp_path / "model")
    weights = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CalibrateError, match="diffusers cannot load it") as caught:
        load_pipeline(find_checkpoint(tmp_path / "model"), device="cpu")
    assert "\n" not in str(caught.value)


def test_pipeline_that_this_diffusers_lacks_is_named(folder):
    write_index(folder, {**INDEX, "_class_name": "PipelineOfTheFuture"})
    with pytest.raises(
        InvalidCheckpoint, match="has no pipeline PipelineOfTheFuture; a newer diffusers"
    ):
        pipeline_class_of(find_checkpoint(folder))


def test_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == "cpu"
    with pytest.raises(InvalidOption, match="torch sees no GPU"):
        pick_device("cuda")
    with pytest.raises(InvalidOption, match="--device tpu"):
        pick_device("tpu")


def test_every_rank_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device("auto") == pick_device("cuda") == "cuda:3"
    assert pick_device("cuda:1") == "cuda:1"


@pytest.mark.parametrize(
    ("name", "slug"),
    [("My Model!", "my-model"), ("../..", "model"), ("FLUX.1-dev", "flux.1-dev")],
)
def test_slug_is_a_safe_folder_name(name, slug):
    assert slug_of(name) == slug


def make_folder(path, pipeline_class, index=None, **configs):
    """The outside of a checkpoint of a class, with the configurations of its components."""
    path.mkdir(parents=True)
    write_index(path, {"_class_name": pipeline_class, **(index or {})})
    for component, config in configs.items():
        (path / component).mkdir()
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        (path / component / name).write_text(json.dumps(config))
    return path


SNAPSHOT = "models--Tongyi-MAI--Z-Image-Turbo/snapshots/" + "0123456789" * 4


@pytest.mark.parametrize(
    ("folder", "pipeline_class", "index", "configs", "alias", "by"),
    [
        (SNAPSHOT, "ZImagePipeline", {}, {}, "Z-Image-Turbo", "the name Tongyi-MAI"),
        ("z-image-turbo", "ZImagePipeline", {}, {}, "Z-Image-Turbo", "the name z-image"),
        ("x", "ZImagePipeline", {"_name_or_path": "Tongyi-MAI/Z-Image-Turbo"}, {}, "Z-Image-Turbo", "the name Tong"),
        ("x", "ZImagePipeline", {}, {"scheduler": {"shift": 3.0}}, "Z-Image-Turbo", "scheduler.shift"),
        ("x", "FluxPipeline", {}, {"transformer": {"guidance_embeds": False}}, "FLUX.1-schnell", "guidance_embeds"),
        ("x", "Flux2KleinPipeline", {"is_distilled": True}, {}, "FLUX.2-klein-4B", "is_distilled"),
        ("x", "WanPipeline", {"boundary_ratio": 0.875}, {"transformer": {"num_layers": 40}}, "Wan2.2-T2V-A14B", "lay"),
        ("x", "WanPipeline", {}, {"transformer": {"num_layers": 40}}, "Wan2.1-T2V-14B", "num_layers"),
    ],
)  # fmt: skip
def test_folder_of_a_known_model_has_its_protocol(
    tmp_path, folder, pipeline_class, index, configs, alias, by
):
    path = make_folder(tmp_path / folder, pipeline_class, index, **configs)
    checkpoint = find_checkpoint(path)
    assert checkpoint.spec.alias == alias and by in checkpoint.recognised
    assert checkpoint.spec.num_steps == find_model(alias).num_steps


def test_snapshot_of_the_hub_is_the_repository_itself(tmp_path):
    """The same run whether the model was given by its name or by the folder that the hub's client made."""
    checkpoint = find_checkpoint(make_folder(tmp_path / SNAPSHOT, "ZImagePipeline"))
    assert checkpoint.repository == "Tongyi-MAI/Z-Image-Turbo"
    assert (checkpoint.slug, checkpoint.revision) == ("z-image-turbo", "0123456789" * 4)


@pytest.mark.parametrize(
    ("folder", "configs"),
    [
        ("my-finetune", {}),
        ("FLUX.1-schnell", {}),
        ("x", {"transformer": {"num_layers": 30}}),
    ],
)
def test_folder_of_another_model_is_not_taken_for_a_known_one(tmp_path, folder, configs):
    """A name counts only with its class, and a configuration only where all of it agrees."""
    checkpoint = find_checkpoint(make_folder(tmp_path / folder, "WanPipeline", **configs))
    assert checkpoint.recognised == "" and checkpoint.spec.num_steps is None


def test_loaded_pipeline_of_a_known_model_has_its_protocol():
    pipeline = load_pipeline(find_checkpoint("tiny-longcat-image"), device="cpu")
    checkpoint = find_checkpoint(pipeline)
    assert checkpoint.spec.alias == "tiny-longcat-image" and checkpoint.spec.num_steps == 28
    pipeline.register_to_config(_name_or_path="/somewhere/else")
    assert "its configuration" in find_checkpoint(pipeline).recognised


def calibrated_entry(checkpoint):
    """An entry of these weights, recorded at 9 steps without guidance."""
    weights = coeffs.Checkpoint(**checkpoint.as_dict())
    protocol = coeffs.Protocol(num_steps=9, guidance_scale=0.0, height=64)
    return coeffs_samples.sample_entry(
        model="my-model",
        pipeline_class="WanPipeline",
        checkpoint=weights,
        protocol=protocol,
    )


@pytest.mark.parametrize("published", [True, False], ids=["published", "recorded here"])
def test_folder_that_was_recorded_once_is_known_under_any_path(
    tmp_path, monkeypatch, published
):
    """Bug: under another name it lost the steps and the guidance that it needs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEACAL_REGISTRY", str(tmp_path / "registry"))
    (tmp_path / "registry").mkdir()
    path = make_folder(tmp_path / "My Model", "WanPipeline", transformer={"num_layers": 3})
    save_file({"w": torch.zeros(2)}, path / "transformer" / "model.safetensors")
    first = find_checkpoint(path)
    assert first.recognised == ""
    entry = calibrated_entry(first)
    if published:
        coeffs.publish(entry, tmp_path / "registry")
    else:
        coeffs.save(entry, tmp_path / "runs" / "some" / "entry.yaml")
    # A draft of a quick trial does not take the place of what was released.
    protocol = dataclasses.replace(entry.protocol, num_steps=3)
    trial = tmp_path / "runs" / ("trial" if published else "older") / "entry.yaml"
    coeffs.save(dataclasses.replace(entry, protocol=protocol), trial)
    os.utime(trial, (0, 0) if not published else None)
    moved = find_checkpoint(path.rename(tmp_path / "elsewhere"))
    assert (moved.slug, moved.repository) == (first.slug, first.repository)
    assert "by the hash of its weights" in moved.recognised
    assert (moved.spec.num_steps, moved.spec.guidance_scale, moved.spec.height) == (
        9,
        0.0,
        64,
    )
    save_file({"w": torch.ones(2)}, moved.folder / "transformer" / "model.safetensors")
    assert find_checkpoint(moved.folder).recognised == ""


def test_empty_name_is_no_model():
    """Bug: it was the current folder, or the embedded model."""
    with pytest.raises(ModelNotFound, match="empty name"):
        find_checkpoint("")


def test_file_that_may_not_be_read_is_not_called_damaged(folder, monkeypatch):
    def refuse(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(folder), "read_bytes", refuse)
    with pytest.raises(InvalidCheckpoint, match=r"Permission denied.; check the rights"):
        find_checkpoint(folder)
