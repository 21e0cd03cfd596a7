"""Prompt sets: what is shipped, what files may look like, and how prompts are named."""

import re

import pytest
from PIL import Image

from calibrate.errors import InvalidPrompts
from calibrate.model.prompts import load_prompts, shipped_sets


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4), "red").save(path)
    return path


def test_default_set_is_seventy_different_prompts_in_seven_kinds_of_ten():
    texts = [prompt.prompt for prompt in load_prompts("default").prompts]
    assert len(texts) == len(set(texts)) == 70
    written_words = texts[5::7]  # every seventh asks for words in the picture
    assert all('"' in text for text in written_words)
    assert not any('"' in text for text in texts if text not in written_words)


@pytest.mark.parametrize("name", list(shipped_sets()))
def test_shipped_sets_load_and_have_no_empty_line(name):
    lines = shipped_sets()[name].read_text(encoding="utf-8").splitlines()
    assert len(load_prompts(name).prompts) == len(lines) >= 10
    assert (
        shipped_sets()[name]
        .with_name("LICENSE.md")
        .read_text()
        .count(f"\n| `{name}` | {len(lines)} |")
        == 1
    )


def test_text_file_gives_one_prompt_a_line(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffa cup\r\n\n  une tasse à café  \n".encode())
    found = load_prompts(path, seed=7).prompts
    assert [(p.prompt, p.seed) for p in found] == [("a cup", 7), ("une tasse à café", 8)]


def test_json_lines_carry_negative_prompt_image_and_seed(tmp_path, image):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "a", "negative_prompt": "b", "image": "a.png", "seed": 5}\n{"prompt": "c"}\n'
    )
    loaded = load_prompts(path)
    first, second = loaded.prompts
    assert (first.negative_prompt, first.seed, second.seed) == ("b", 5, 1)
    assert loaded.images[first.image[0]] == image and second.image == ()


def test_same_content_has_the_same_id_wherever_it_stands():
    """Otherwise a held-out split has one prompt on both sides, and runs recorded apart clash."""
    first, second = load_prompts(["a", "b", "a"]), load_prompts(["b", "a"])
    ids = [p.prompt_id for p in first.prompts]
    assert (
        ids[0]
        == ids[2]
        == second.prompts[1].prompt_id
        != ids[1]
        == second.prompts[0].prompt_id
    )


def test_id_depends_on_everything_but_the_seed(tmp_path, image):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt":"a"}\n{"prompt":"a","negative_prompt":"x"}\n{"prompt":"a","image":"a.png"}\n'
    )
    assert len({p.prompt_id for p in load_prompts(path).prompts}) == 3


def test_more_prompts_of_the_same_set_keep_its_hash():
    whole = load_prompts("default")
    assert (
        whole.first(10).sha256
        == whole.first(20).sha256
        == whole.sha256
        != load_prompts("default", seed=1).sha256
    )


def test_images_go_round_the_prompts(tmp_path):
    for name in "ab":
        Image.new("RGB", (4, 4), (ord(name), 0, 0)).save(tmp_path / f"{name}.png")
    names = [p.image for p in load_prompts(["1", "2", "3"], images=[tmp_path]).prompts]
    assert names[0] == names[2] != names[1]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"", "no prompt in it"),
        ("p.txt", b"\n \n", "no prompt in it"),
        ("p.txt", b"fine\n\xff\xfe\n", "p.txt:2: not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "p.jsonl:2: not JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n\n["b"]\n', "p.jsonl:3: list found"),
        ("p.jsonl", b'{"text": "a"}\n', "p.jsonl:1: unknown field text"),
        ("p.jsonl", b'{"prompt": 3}\n', "p.jsonl:1: no text under 'prompt'"),
        ("p.jsonl", b'{"prompt": "a", "seed": -1}\n', "p.jsonl:1: the seed is -1"),
        ("p.jsonl", b'{"prompt": "a", "seed": true}\n', "p.jsonl:1: the seed is True"),
        (
            "p.jsonl",
            b'{"prompt": "a", "seed": 18446744073709551616}\n',
            "p.jsonl:1: the seed is",
        ),
        (
            "p.jsonl",
            b'{"prompt": "a", "negative_prompt": 1}\n',
            "p.jsonl:1: 'negative_prompt' is 1",
        ),
        ("p.jsonl", b'{"prompt": "a", "image": 1}\n', "p.jsonl:1: 'image' is 1"),
        (
            "p.jsonl",
            b'{"prompt": "a", "image": "no.png"}\n',
            "p.jsonl:1: .*no.png: No such file",
        ),
        ("p.jsonl", b'{"prompt": "a", "image": "p.jsonl"}\n', "p.jsonl:1: .*not an image"),
        (
            "p.jsonl",
            b'{"prompt":"a","seed":3}\n{"prompt":"a","seed":3}\n',
            "p.jsonl:2: the same prompt .*p.jsonl:1",
        ),
        ("p.jsonl", b"[" * 100_000, "p.jsonl:1: not JSON"),
    ],
)
def test_broken_files_are_named_with_the_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidPrompts, match=said) as caught:
        load_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_file_that_is_not_there_names_the_shipped_sets():
    with pytest.raises(InvalidPrompts, match=r"nowhere.txt: No such file.*default"):
        load_prompts("nowhere.txt")


@pytest.mark.parametrize("count", [0, 3])
def test_number_of_prompts_has_to_be_there(count):
    with pytest.raises(InvalidPrompts, match=re.escape("has 2; ask for 1 to that many")):
        load_prompts(["a", "b"]).first(count)


def test_damaged_image_and_empty_folder_are_refused(tmp_path):
    with pytest.raises(InvalidPrompts, match="no image in it"):
        load_prompts(["a"], images=[tmp_path])
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(InvalidPrompts, match="cannot be decoded"):
        load_prompts(["a"], images=[tmp_path])
