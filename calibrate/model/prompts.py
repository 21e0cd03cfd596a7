"""Prompt sets: the shipped ones by name, and a user's own files (text, or JSON lines)."""

import codecs
import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from calibrate.errors import InvalidPrompts
from calibrate.model.protocol import AnyPath, Settings, canonical_sha256
from calibrate.text import did_you_mean, siblings

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
_IMAGES = ", ".join(sorted(IMAGE_SUFFIXES))
# Shipped sets that are never recorded by default: `verify` judges on them once a run has recorded all of the first.
HELD_OUT_SETS = {
    "default": "held-out",
    "video": "video-held-out",
    "audio": "audio-held-out",
}
_FIELDS = {"prompt", "negative_prompt", "image", "seed"}
_MAX_SEED = 2**63 - 1  # torch.Generator takes a signed 64-bit number


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One generation to record.

    ``prompt_id`` hashes the content (text, negative text, images) and not the position, so that the same prompt keeps
    its name in every run: a held-out split by ``prompt_id`` never has one prompt on both sides, and runs recorded
    apart can be fitted together.
    """

    prompt_id: str
    prompt: str
    negative_prompt: str | None = None
    image: tuple[str, ...] = ()  # names in the run's inputs/ folder, by content
    seed: int = 0

    def as_dict(self) -> Settings:
        """The row of the manifest; one image is a name, several are a list."""
        image = self.image[0] if len(self.image) == 1 else list(self.image) or None
        return {**asdict(self), "image": image}

    @classmethod
    def from_dict(cls, row: Settings) -> "Prompt":
        """The prompt in a row of the manifest."""
        image = row.get("image")
        return cls(
            prompt_id=str(row["prompt_id"]),
            prompt=row.get("prompt", ""),
            negative_prompt=row.get("negative_prompt"),
            image=(image,) if isinstance(image, str) else tuple(image or ()),
            seed=row.get("seed", 0),
        )


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Prompts in order, and where the images that they name are.

    ``sha256`` and ``total`` are of the whole set, whatever part of it is used: asking for more continues a run.
    """

    prompts: tuple[Prompt, ...]
    sha256: str
    name: str
    total: int
    images: dict[str, Path] = field(default_factory=dict)

    def first(self, count: int | None) -> "PromptSet":
        """The first ``count`` prompts; all of them for None."""
        if count is None:
            return self
        if not 1 <= count <= len(self.prompts):
            raise InvalidPrompts(
                f"--num-prompts {count}: {self.name} has {len(self.prompts)}; ask for 1 to that many"
            )
        return replace(self, prompts=self.prompts[:count])


class _Line(NamedTuple):
    where: str  # file:line, for messages
    fields: Settings
    folder: Path  # where relative image paths start


def shipped_sets() -> dict[str, Path]:
    """Name -> file of every prompt set that comes with the package."""
    folder = Path(str(files("calibrate") / "data" / "prompts"))
    return {path.stem: path for path in sorted(folder.glob("*.txt"))}


def load_prompts(
    source: AnyPath | Sequence[str] | None = None,
    *,
    seed: int = 0,
    images: Iterable[AnyPath] = (),
) -> PromptSet:
    """Read a shipped set (by name; ``default`` for None), a ``.txt`` or ``.jsonl`` file, or a list of texts.

    The prompt at position i gets the seed ``seed + i`` unless its line names one. ``images`` (files or folders) go
    round the prompts that name no image of their own.
    """
    if source is None or isinstance(source, AnyPath):
        path = shipped_sets().get(str(source or "default"), Path(source or "default"))
        name, lines = path.name, _read(path)
    else:
        name = "the given list"
        lines = [
            _Line(f"prompt {i}", {"prompt": text}, Path()) for i, text in enumerate(source, 1)
        ]
    if not lines:
        raise InvalidPrompts(f"{name}: no prompt in it; expected at least one")
    shared = [_image_name(path) for path in _image_files(images)]
    known = dict(shared)
    in_turn = itertools.cycle([[image] for image in shared] or [[]])
    prompts: list[Prompt] = []
    seen: dict[tuple[str, int], str] = {}
    for index, (line, turn) in enumerate(zip(lines, in_turn, strict=False)):
        own = _own_images(line)
        known.update(own)
        names = tuple(image for image, _ in own or turn)
        prompt = _prompt(line, names, default_seed=seed + index)
        first = seen.setdefault((prompt.prompt_id, prompt.seed), line.where)
        if first != line.where:
            raise InvalidPrompts(
                f"{line.where}: the same prompt with the same seed as {first}; give it another seed"
            )
        prompts.append(prompt)
    return PromptSet(
        prompts=tuple(prompts),
        sha256=canonical_sha256([prompt.as_dict() for prompt in prompts]),
        name=name,
        total=len(prompts),
        images=known,
    )


def _prompt(line: _Line, images: tuple[str, ...], default_seed: int) -> Prompt:
    text: Any = line.fields.get("prompt")
    negative = line.fields.get("negative_prompt")
    seed = line.fields.get("seed")
    seed = default_seed if seed is None else seed
    problem = ""
    if not isinstance(text, str):
        problem = 'no text under \'prompt\'; expected {"prompt": "..."}'
    elif not isinstance(negative, str | None):
        problem = f"'negative_prompt' is {negative!r}; expected text"
    elif type(seed) is not int or not 0 <= seed <= _MAX_SEED:
        problem = f"the seed is {seed!r}; expected a whole number from 0 to 2^63 - 1"
    if problem:
        raise InvalidPrompts(f"{line.where}: {problem}")
    prompt_id = canonical_sha256([text, negative, list(images)])[:12]
    return Prompt(
        prompt_id=prompt_id, prompt=text, negative_prompt=negative, image=images, seed=seed
    )


def _read(path: Path) -> list[_Line]:
    """Every line that is not blank."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        shipped = shipped_sets()
        hint = did_you_mean(str(path), [*shipped, *siblings(path)]) or (
            "expected a .txt or .jsonl file or one of the shipped sets"
        )
        raise InvalidPrompts(
            f"{path}: {error.strerror}; {hint} ({', '.join(shipped)})"
        ) from None
    lines = []
    for number, line in enumerate(raw.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise InvalidPrompts(
                f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); save the file as UTF-8"
            ) from None
        if text:
            fields = (
                _json_fields(where, text) if path.suffix == ".jsonl" else {"prompt": text}
            )
            lines.append(_Line(where, fields, path.parent))
    return lines


def _json_fields(where: str, text: str) -> Settings:
    try:
        fields = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidPrompts(
            f"{where}: not JSON ({error}); expected one object a line"
        ) from None
    if not isinstance(fields, dict):
        raise InvalidPrompts(
            f'{where}: {type(fields).__name__} found; expected an object such as {{"prompt": "..."}}'
        )
    unknown = ", ".join(sorted(set(fields) - _FIELDS))
    if unknown:
        raise InvalidPrompts(
            f"{where}: unknown field {unknown}; expected {', '.join(sorted(_FIELDS))}"
        )
    return fields


def _own_images(line: _Line) -> list[tuple[str, Path]]:
    value = line.fields.get("image") or []
    paths = [value] if isinstance(value, str) else value
    try:
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise InvalidPrompts(
                f"'image' is {value!r}; expected a file name or a list of them"
            )
        return [_image_name(line.folder / path) for path in paths]
    except InvalidPrompts as error:
        raise InvalidPrompts(f"{line.where}: {error}") from None


def _image_files(sources: Iterable[AnyPath]) -> list[Path]:
    """Files as they are, folders as the images in them by name."""
    paths: list[Path] = []
    for source in map(Path, sources):
        images = [source]
        if source.is_dir():
            images = [
                path for path in source.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES
            ]
        if not images:
            raise InvalidPrompts(f"{source}: no image in it; expected {_IMAGES}")
        paths += sorted(images)
    return paths


def _image_name(path: Path) -> tuple[str, Path]:
    """(name by content, file) of an image that can be decoded."""
    from PIL import Image

    suffix = path.suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        raise InvalidPrompts(f"{path}: not an image; expected {_IMAGES}")
    try:
        raw = path.read_bytes()
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "it cannot be decoded as an image"
        raise InvalidPrompts(f"{path}: {reason}") from None
    return hashlib.sha256(raw).hexdigest()[:16] + suffix, path
