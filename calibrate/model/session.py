"""What is recorded: the denoisers to watch, one generation per prompt, and what identifies both."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from calibrate.errors import InvalidOption
from calibrate.model.call import Call
from calibrate.model.checkpoint import slug_of
from calibrate.model.prompts import Prompt
from calibrate.model.protocol import Protocol, canonical_sha256
from calibrate.model.table import find_model


@dataclass(frozen=True, kw_only=True)
class Subject:
    """``generate(prompt, images)`` runs one whole generation through ``modules`` (expert name -> module)."""

    modules: Mapping[str, Any]
    generate: Callable[[Prompt, list[Any]], Any]
    identity: dict[
        str, Any
    ]  # the manifest's fields that a coefficient depends on, hashed in protocol_sha256
    pipeline: Any = None
    call: dict[str, Any] = field(
        default_factory=dict
    )  # arguments of every generation, for whoever repeats one


def pipeline_subject(
    pipeline: Any, call: Call, *, slug: str | None = None, checkpoint: dict | None = None
) -> Subject:
    """A loaded diffusers pipeline, called as `calibrate.model.call.prepare_call` worked out."""
    import torch

    from runtime import denoisers
    from runtime.facts import repository_of

    modules = denoisers(pipeline)
    repository = repository_of(pipeline) or type(pipeline).__name__
    spec = find_model(repository)

    def generate(prompt: Prompt, images: list[Any]) -> None:
        arguments = {**call.arguments, "prompt": prompt.prompt}
        if prompt.negative_prompt is not None:
            arguments["negative_prompt"] = prompt.negative_prompt
        if images:
            arguments["image"] = images[0] if len(images) == 1 else images
        pipeline(**arguments, generator=torch.Generator("cpu").manual_seed(prompt.seed))

    return Subject(
        modules=modules,
        generate=generate,
        pipeline=pipeline,
        call=_plain(call.arguments),
        identity=_identity(
            model=slug or (spec.slug if spec else slug_of(repository.rpartition("/")[2])),
            modules=modules,
            pipeline_class=type(pipeline).__name__,
            checkpoint=checkpoint or {"repository": repository, "revision": None, "sha256": None},
            scheduler=getattr(pipeline, "scheduler", None),
            settings=call.protocol,
        ),
    )


def callable_subject(
    name: str, generate: Callable[[str, int], Any], modules: Any, settings: dict[str, Any]
) -> Subject:
    """Any callable ``generate(prompt, seed)`` with the module, or expert name -> module, that it runs."""
    if modules is None:
        raise InvalidOption(
            "generate without modules: name the denoiser to watch, such as modules=model.transformer"
        )
    modules = dict(modules) if isinstance(modules, Mapping) else {"transformer": modules}

    def generate_one(prompt: Prompt, images: list[Any]) -> None:
        if images or prompt.negative_prompt is not None:
            raise InvalidOption(
                "generate(prompt, seed) takes no image and no negative prompt; prompts must have none"
            )
        generate(prompt.prompt, prompt.seed)

    identity = _identity(
        model=slug_of(name),
        modules=modules,
        pipeline_class=None,
        checkpoint={"repository": name, "revision": None, "sha256": None},
        scheduler=None,
        settings=settings,
    )
    return Subject(modules=modules, generate=generate_one, identity=identity)


def _identity(
    *,
    model: str,
    modules: Mapping[str, Any],
    checkpoint: dict,
    scheduler: Any,
    settings: dict,
    **fields: Any,
) -> dict[str, Any]:
    from runtime.facts import lora_of, quantization_of, shift_of

    config = _plain(dict(getattr(scheduler, "config", None) or {}))
    first = next(iter(modules.values()))
    protocol = Protocol(
        scheduler=type(scheduler).__name__ if scheduler is not None else None,
        shift=shift_of(scheduler),
        dtype=str(getattr(first, "dtype", "")).removeprefix("torch.") or None,
        quantization=quantization_of(first),
        lora=lora_of(first),
        **settings,
    )
    identity = {
        "model": model,
        "transformer_classes": {name: type(module).__name__ for name, module in modules.items()},
        **fields,
        "checkpoint": checkpoint,
        "protocol": _plain(protocol.as_dict()),
        "scheduler_config": {
            key: value for key, value in config.items() if not key.startswith("_")
        },
    }
    return {**identity, "protocol_sha256": canonical_sha256(identity)}


def _plain(value: Any) -> Any:
    """The value with only what YAML and JSON both write: tuples as lists, anything foreign as its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float):  # subclasses too: NumPy's numbers are no YAML
        if isinstance(value, kind):
            return kind(value)
    return str(value)


def command_line(options: Mapping[str, Any]) -> str:
    """The command that records the same again: the options that differ from their default, and no machine's path."""
    words = ["calibrate", "record"]
    for name, value in options.items():
        # What has no place on a command line (a loaded pipeline, a list of prompts) is left out.
        values = value if isinstance(value, list) and name in {"image", "pipe_arg"} else [value]
        for item in values:
            if isinstance(item, (str, int, float, PathLike)):
                text = str(item)
                words += [
                    f"--{name.replace('_', '-')}",
                    Path(text).name if Path(text).exists() else text,
                ]
    return shlex.join(words)
