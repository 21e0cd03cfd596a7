"""What a verification works on: an entry, the run it came from where there is one, and the loaded pipeline."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coeffs
from calibrate.errors import InvalidOption, InvalidPrompts, ModelNotFound
from calibrate.model.call import prepare_call
from calibrate.model.checkpoint import find_checkpoint
from calibrate.model.loading import load_pipeline
from calibrate.model.prompts import Prompt, PromptSet
from calibrate.model.table import class_defaults, find_model
from calibrate.runs.pairs import Run, load_run
from coeffs import Entry

STEPS = "num_inference_steps"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that stays the same during a verification.

    Attributes:
        arguments: Of every pipeline call besides the prompt's own.
        identity: What a sample depends on besides arguments and prompt: model, weights, dtype, device.
        folder: Where ``verify/`` and the verified entry go.
    """

    entry: Entry
    run: Run | None
    manifest: Mapping[str, Any]
    pipeline: Any
    modules: Mapping[str, Any]
    arguments: Mapping[str, Any]
    accepts: Callable[[str], bool]
    num_steps: int
    identity: dict[str, Any]
    folder: Path
    prompt_source: str = "default"

    @property
    def transformer_class(self) -> str:
        return type(next(iter(self.modules.values()))).__name__

    @property
    def device(self) -> str:
        """The device in words, as the verified table names it."""
        import torch

        device = next(iter(self.modules.values())).device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    @property
    def recorded_prompts(self) -> list[Prompt]:
        """The prompts of the run; empty for an entry without one."""
        return [
            Prompt(
                prompt_id=str(row["prompt_id"]),
                prompt=row["prompt"],
                negative_prompt=row.get("negative_prompt"),
                image=tuple(
                    [row["image"]] if isinstance(row.get("image"), str) else row.get("image") or ()
                ),
                seed=row["seed"],
            )
            for row in self.manifest.get("prompts", [])
        ]

    def open_images(self, prompt: Prompt, prompts: PromptSet) -> list[Any]:
        """The prompt's input images, from the set that names them or from the run's ``inputs/``."""
        from PIL import Image, ImageOps

        opened = []
        for name in prompt.image:
            path = prompts.images.get(name, self.folder / "inputs" / Path(name).name)
            try:
                with Image.open(path) as image:
                    opened.append(ImageOps.exif_transpose(image).convert("RGB"))
            except OSError as error:
                raise InvalidPrompts(
                    f"{path}: cannot be read as an image ({error}); give it again with --image"
                ) from None
        return opened


def open_case(
    source: str | os.PathLike | Entry,
    *,
    model: Any,
    registry: str | os.PathLike | None,
    out: str | os.PathLike | None,
    dtype: str | None,
    device: str,
) -> Case:
    """Find entry, run and weights, load the pipeline, and check that they belong together."""
    folder = (
        Path(source) if isinstance(source, str | os.PathLike) and Path(source).is_dir() else None
    )
    manifest: Mapping[str, Any] = {}
    run = None
    if folder is not None and (folder / "run.yaml").exists():
        run = load_run(folder)
        manifest = run.manifest
        if not (folder / "entry.yaml").exists():
            raise InvalidOption(
                f"{folder}: no entry.yaml in it yet; run `calibrate fit {folder}` first"
            )
        if out is not None and Path(out) != folder:
            raise InvalidOption(
                f"--out {out}: a run's verification goes into the run's own folder; leave --out away"
            )
    entry = (
        source
        if isinstance(source, Entry)
        else coeffs.load(folder / "entry.yaml" if run else source, registry)
    )
    if not any(expert.branches for expert in entry.experts.values()):
        raise InvalidOption(
            f"{entry.label}: no coefficients in it, only ratios or plans; nothing to verify with a gate"
        )
    if run is None:
        folder = (
            Path(out)
            if out is not None
            else Path("runs") / f"verify-{entry.label.replace('/', '-')}"
        )
    loaded = hasattr(model, "components")
    wanted = manifest.get("checkpoint") or {"repository": entry.checkpoint.repository}
    if loaded:
        pipeline, weights = model, dict(wanted)
    else:
        pipeline, weights = _load(entry, manifest, model, wanted, dtype, device)
    pipeline.set_progress_bar_config(disable=True)
    return _checked(entry, run, manifest, pipeline, weights, folder)


def _load(
    entry: Entry, manifest: Mapping, model: Any, wanted: Mapping, dtype: str | None, device: str
) -> tuple:
    alias = find_model(str(manifest.get("model") or entry.model))
    name = model or (alias.alias if alias else None) or wanted.get("repository")
    if not name:
        raise InvalidOption(f"{entry.label}: it names no checkpoint; give the model with --model")
    try:
        checkpoint = find_checkpoint(name)
    except ModelNotFound as error:
        if model:
            raise
        raise ModelNotFound(
            f"{name}: no weights of that name are known; give their folder with --model"
        ) from error
    weights = checkpoint.as_dict()
    for key in ("revision", "sha256"):
        if wanted.get(key) and weights.get(key) and wanted[key] != weights[key]:
            raise InvalidOption(
                f"{name}: other weights than the run was recorded on ({key} {weights[key][:12]} instead of "
                f"{wanted[key][:12]}); give the same checkpoint with --model, or record these"
            )
    recorded = (manifest.get("protocol") or {}).get("dtype") or entry.protocol.dtype
    return load_pipeline(checkpoint, dtype=dtype or recorded or "bfloat16", device=device), weights


def _checked(
    entry: Entry, run: Run | None, manifest: Mapping, pipeline: Any, weights: dict, folder: Path
) -> Case:
    from runtime.apply import denoisers

    modules = denoisers(pipeline)
    classes = [type(module).__name__ for module in modules.values()]
    if entry.transformer_class and entry.transformer_class not in classes:
        raise InvalidOption(
            f"{entry.label} is for {entry.transformer_class}, but the pipeline has {', '.join(classes)}; "
            "its coefficients mean nothing there"
        )
    spec = find_model(str(manifest.get("model") or entry.model)) or class_defaults(
        type(pipeline).__name__
    )
    parameters = inspect.signature(type(pipeline).__call__).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if manifest:
        arguments = dict(manifest.get("call") or {})
    else:
        protocol = entry.protocol
        call = prepare_call(
            type(pipeline).__call__, spec, steps=protocol.num_steps, guidance_scale=protocol.guidance_scale,
            height=protocol.height, width=protocol.width, num_frames=protocol.num_frames,
            pipe_args=protocol.call_arguments,
        )  # fmt: skip
        arguments = dict(call.arguments)
    default = parameters[STEPS].default if STEPS in parameters else None
    num_steps = arguments.get(STEPS) or default
    if not isinstance(num_steps, int) or num_steps < 3:
        raise InvalidOption(
            f"{num_steps!r} denoising steps: a verification needs at least 3 to have something to skip"
        )
    first = next(iter(modules.values()))
    return Case(
        entry=entry,
        run=run,
        manifest=manifest,
        pipeline=pipeline,
        modules=modules,
        arguments=arguments,
        accepts=lambda name: open_ended or name in parameters,
        num_steps=num_steps,
        identity={
            "classes": classes,
            "weights": weights,
            "dtype": str(first.dtype),
            "device": str(first.device.type),
        },
        folder=folder,
        prompt_source=spec.prompts if spec else "default",
    )
