"""The embedded model: what lies in its folder, that it loads plainly, and that it draws the digit asked for."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, LongCatImagePipeline

from training.tiny_longcat_image.data import (
    COLOURINGS,
    DIGIT_WORDS,
    IMAGE_SIZE,
    digit_masks,
    evenly_ordered_captions,
    paint,
)
from training.tiny_longcat_image.reading import DigitReader, expected_names

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "calibrate" / "embedded" / "tiny-longcat-image"
PROMPTS = ROOT / "calibrate" / "data" / "prompts" / "tiny-longcat-image.txt"
MAX_BYTES = 8_000_000


@pytest.fixture(scope="module")
def pipeline() -> LongCatImagePipeline:
    loaded = DiffusionPipeline.from_pretrained(FOLDER, dtype=torch.bfloat16)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return PROMPTS.read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def reader() -> DigitReader:
    return DigitReader()


def test_folder_is_small_and_holds_no_pickles():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert {path.suffix for path in files} <= {".json", ".jinja", ".md", ".safetensors"}


def strings_in(value: object) -> list[str]:
    """All strings in a JSON value, keys included."""
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in strings_in(part)]
    if isinstance(value, list):
        return [text for part in value for text in strings_in(part)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize(
    "file",
    [*sorted(FOLDER.rglob("*config.json")), FOLDER / "model_index.json"],
    ids=lambda f: f.parent.name,
)
def test_configs_hold_no_local_paths(file):
    texts = strings_in(json.loads(file.read_text(encoding="utf-8")))
    assert not [
        text for text in texts if text.startswith(("/", "~", ".")) or "name_or_path" in text
    ]


def test_loads_as_the_real_classes_in_bf16(pipeline):
    assert type(pipeline) is LongCatImagePipeline
    assert {parameter.dtype for parameter in pipeline.transformer.parameters()} == {
        torch.bfloat16
    }
    blocks = len(pipeline.transformer.transformer_blocks) + len(
        pipeline.transformer.single_transformer_blocks
    )
    assert blocks >= 6


def test_prompt_file_is_the_even_order_of_all_captions(prompts):
    captions = evenly_ordered_captions()
    assert prompts == [caption.text for caption in captions]
    assert len(set(prompts)) == len(prompts)
    for count in (10, 20, 50, 100):
        first = captions[:count]
        assert max_spread([caption.digit for caption in first], range(len(DIGIT_WORDS))) <= 1
        assert max_spread([caption.colouring for caption in first], COLOURINGS) <= 1


def max_spread(values: list, kinds) -> int:
    """How much more often the commonest kind occurs than the rarest."""
    counts = [values.count(kind) for kind in kinds]
    return max(counts) - min(counts)


def test_captions_round_trip_through_the_tokenizer(pipeline, prompts):
    tokenizer = pipeline.tokenizer
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        assert tokenizer.decode(ids) == prompt
        assert tokenizer.unk_token_id not in ids
        assert len(ids) <= 12  # words of the captions are tokens of their own


@pytest.mark.parametrize("colouring", COLOURINGS, ids=str)
def test_reader_tells_digits_and_colours_of_real_digits(reader, colouring):
    masks, labels = digit_masks()
    pictures = (paint(masks[:40], colouring) / 2 + 0.5).permute(0, 2, 3, 1).numpy()
    readings = reader.read(pictures)
    assert [reading.digit for reading in readings] == labels[:40].tolist()
    assert {(reading.ink, reading.paper) for reading in readings} == {
        expected_names(colouring)
    }


def test_draws_the_digit_and_the_colours_asked_for(pipeline, reader):
    captions = evenly_ordered_captions()[:8]
    pictures = pipeline(
        [caption.text for caption in captions],
        height=IMAGE_SIZE,
        width=IMAGE_SIZE,
        num_inference_steps=12,
        guidance_scale=4.5,
        enable_prompt_rewrite=False,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(captions))],
        output_type="np",
    ).images
    readings = reader.read(pictures)
    pairs = list(zip(captions, readings, strict=True))
    assert sum(reading.digit == caption.digit for caption, reading in pairs) >= 6
    colours = [
        (reading.ink, reading.paper) == expected_names(caption.colouring)
        for caption, reading in pairs
    ]
    assert sum(colours) >= 6
