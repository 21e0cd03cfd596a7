"""What real runs are made of: an entry, the run it came from where there is one, and the loaded session."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import coeffs
from calibrate.errors import InvalidOption, InvalidPrompts, ModelNotFound
from calibrate.model.call import Call, prepare_call
from calibrate.model.checkpoint import Checkpoint, find_checkpoint, pipeline_class_of
from calibrate.model.prompts import Prompt, PromptSet, load_prompts
from calibrate.model.session import Session, load_session
from calibrate.model.table import class_defaults, find_model
from calibrate.runs.folder import RunFolder
from calibrate.runs.pairs import Run, load_run
from coeffs import Entry

HELD_OUT_SET = "held-out"
STEPS = "num_inference_steps"
MIN_STEPS = 3  # the first step computes; of two there is nothing to compare


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that stays the same during a verification or a planning.

    Attributes:
        identity: What a sample depends on besides arguments and prompt: model, weights, dtype, device.
        folder: Where ``verify/`` and the entry go.
        prompt_source: The model's own prompt set.
    """

    entry: Entry
    run: Run | None
    session: Session
    num_steps: int
    identity: dict[str, Any]
    folder: Path
    prompt_source: str = "default"

    @property
    def manifest(self) -> Mapping[str, Any]:
        return {} if self.run is None else self.run.manifest

    @property
    def transformer_class(self) -> str:
        return type(next(iter(self.session.modules.values()))).__name__

    @property
    def recorded_prompts(self) -> list[Prompt]:
        """The prompts of the run; empty for an entry without one."""
        if self.run is None:
            return []
        return [group.prompt for group in RunFolder.open(self.folder).groups]

    @property
    def recorded_images(self) -> dict[str, Path]:
        """Name -> file of the images of recorded prompts."""
        return {} if self.run is None else RunFolder.open(self.folder).images

    def at_steps(self, num_steps: int) -> Case:
        """The same with another number of denoising steps."""
        arguments = {**self.session.arguments, STEPS: num_steps}
        call = replace(self.session.call, arguments=arguments)
        return replace(self, session=replace(self.session, call=call), num_steps=num_steps)


def open_case(
    source: str | os.PathLike | Entry,
    *,
    model: Any,
    registry: str | os.PathLike | None,
    out: str | os.PathLike | None,
    dtype: str | None,
    device: str,
) -> Case:
    """Find entry, run and weights, check that they belong together, and load the pipeline."""
    folder = _run_folder(source)
    run = None if folder is None else load_run(folder)
    entry = _entry(source, folder, registry)
    if folder is not None and out is not None and Path(out) != folder:
        raise InvalidOption(
            f"--out {out}: a run's verification goes into the run's own folder; leave --out away"
        )
    if folder is None:
        default = Path("runs") / f"verify-{entry.label.replace('/', '-')}"
        folder = default if out is None else Path(out)
    manifest = {} if run is None else run.manifest
    checkpoint, weights = _checkpoint(entry, manifest, model)
    call = _call(entry, manifest, checkpoint)
    num_steps = call.protocol["num_steps"]
    if not isinstance(num_steps, int) or num_steps < MIN_STEPS:
        raise InvalidOption(
            f"{num_steps!r} denoising steps: a verification needs at least {MIN_STEPS} to have something to skip"
        )
    recorded = (manifest.get("protocol") or {}).get("dtype") or entry.protocol.dtype
    session = load_session(checkpoint, call, dtype=dtype or recorded or "bfloat16", device=device)
    session.pipeline.set_progress_bar_config(disable=True)
    return Case(
        entry=entry,
        run=run,
        session=session,
        num_steps=num_steps,
        identity=_identity(entry, session, weights),
        folder=folder,
        prompt_source=checkpoint.spec.prompts if checkpoint.spec else "default",
    )


def held_out_prompts(
    case: Case, prompts: Any, num_prompts: int, seed: int, images: Iterable[str | os.PathLike]
) -> PromptSet:
    """Prompts that the run did not record, by content and whatever their seed.

    By default the model's own set; where the set ``default`` is used up, the shipped ``held-out``.
    """
    recorded = {prompt.prompt_id for prompt in case.recorded_prompts}
    images = list(images)
    sources = [case.prompt_source if prompts is None else prompts]
    if sources == ["default"]:
        sources.append(HELD_OUT_SET)
    for source in sources:
        offered = load_prompts(source, seed=seed, images=images)
        unseen = tuple(prompt for prompt in offered.prompts if prompt.prompt_id not in recorded)
        if unseen:
            return replace(offered, prompts=unseen[:num_prompts])
    raise InvalidPrompts(
        f"{offered.name}: every prompt of it was recorded for the fit; give others with --prompts"
    )


def _run_folder(source: str | os.PathLike | Entry) -> Path | None:
    """The run that ``source`` names, if it names one."""
    if isinstance(source, Entry) or not (Path(source) / "run.yaml").exists():
        return None
    return Path(source)


def _entry(
    source: str | os.PathLike | Entry, folder: Path | None, registry: str | os.PathLike | None
) -> Entry:
    if isinstance(source, Entry):
        entry = source
    elif folder is None:
        entry = coeffs.load(source, registry)
    elif (folder / "entry.yaml").exists():
        entry = coeffs.load(folder / "entry.yaml", registry)
    else:
        raise InvalidOption(
            f"{folder}: no entry.yaml in it yet; run `calibrate fit {folder}` first"
        )
    if not any(expert.branches for expert in entry.experts.values()):
        raise InvalidOption(
            f"{entry.label}: no coefficients in it, only ratios or plans; nothing to verify with a gate"
        )
    return entry


def _checkpoint(
    entry: Entry, manifest: Mapping[str, Any], model: Any
) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint to run, and what is known of its weights; other weights than the recorded ones are refused."""
    stated = manifest.get("checkpoint") or {"repository": entry.checkpoint.repository}
    known = find_model(str(manifest.get("model") or entry.model))
    if hasattr(model, "components"):
        checkpoint = find_checkpoint(model)
        return replace(checkpoint, spec=known or checkpoint.spec), dict(stated)
    name = model or (known.alias if known else None) or stated.get("repository")
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
        if stated.get(key) and weights.get(key) and stated[key] != weights[key]:
            raise InvalidOption(
                f"{name}: other weights than the run was recorded on ({key} {weights[key][:12]} instead of "
                f"{stated[key][:12]}); give the same checkpoint with --model, or record these"
            )
    spec = known or class_defaults(checkpoint.pipeline_class)
    return replace(checkpoint, spec=spec), weights


def _call(entry: Entry, manifest: Mapping[str, Any], checkpoint: Checkpoint) -> Call:
    """The recorded arguments, or those of the entry's protocol."""
    pipeline_call = pipeline_class_of(checkpoint).__call__
    if manifest:
        return prepare_call(pipeline_call, None, pipe_args=manifest.get("call"))
    protocol = entry.protocol
    return prepare_call(
        pipeline_call,
        checkpoint.spec,
        steps=protocol.num_steps,
        guidance_scale=protocol.guidance_scale,
        height=protocol.height,
        width=protocol.width,
        num_frames=protocol.num_frames,
        pipe_args=protocol.call_arguments,
    )


def _identity(entry: Entry, session: Session, weights: dict[str, Any]) -> dict[str, Any]:
    classes = [type(module).__name__ for module in session.modules.values()]
    if entry.transformer_class and entry.transformer_class not in classes:
        raise InvalidOption(
            f"{entry.label} is for {entry.transformer_class}, but the pipeline has {', '.join(classes)}; "
            "its coefficients mean nothing there"
        )
    first = next(iter(session.modules.values()))
    return {
        "classes": classes,
        "weights": weights,
        "dtype": str(first.dtype),
        "device": str(first.device.type),
    }
