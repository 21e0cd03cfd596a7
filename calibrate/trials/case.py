"""What real runs are made of: an entry, the run it came from where there is one, and the loaded session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import coeffs
from calibrate.errors import InvalidOption, ModelNotFound
from calibrate.model.call import Call, prepare_call
from calibrate.model.checkpoint import Checkpoint, find_checkpoint, pipeline_class_of
from calibrate.model.loading import pick_device
from calibrate.model.prompts import HELD_OUT_SETS, Prompt, PromptSet, load_prompts
from calibrate.model.session import Session, callable_session, load_session
from calibrate.model.table import class_defaults, find_model
from calibrate.runs.folder import RunFolder
from calibrate.runs.pairs import Run, load_run
from calibrate.runs.purposes import RECORDED, purposes
from coeffs import Entry

STEPS = "num_inference_steps"
MIN_STEPS = 3  # the first step computes; of two there is nothing to compare


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that stays the same during a verification or a planning.

    The weights are loaded when ``session`` is asked for first, so that every setting can be checked before.

    Attributes:
        folder: Where ``verify/`` and the entry go.
        weights: What is known of the checkpoint's weights.
        loading: Options of :func:`calibrate.model.session.load_session`.
        own: The model where the caller drives it; there is no checkpoint then.
    """

    entry: Entry
    run: Run | None
    folder: Path
    checkpoint: Checkpoint | None
    call: Call
    weights: dict[str, Any]
    loading: dict[str, Any]
    own: Session | None = None

    @cached_property
    def session(self) -> Session:
        """The loaded model and its call."""
        if self.own is not None:
            return replace(self.own, call=self.call)
        assert self.checkpoint is not None
        session = load_session(self.checkpoint, self.call, **self.loading)
        session.pipeline.set_progress_bar_config(disable=True)
        return session

    @property
    def num_steps(self) -> int:
        return self.call.protocol["num_steps"]

    @property
    def prompt_source(self) -> str:
        """The model's own prompt set."""
        spec = None if self.checkpoint is None else self.checkpoint.spec
        return "default" if spec is None else spec.prompts

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a sample depends on besides arguments and prompt: model, weights, dtype, device."""
        return _identity(self.entry, self.session, self.weights)

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
    def purposes(self) -> dict[str, str]:
        """What each prompt was used for: prompt id -> purpose."""
        recorded = {prompt.prompt_id: RECORDED for prompt in self.recorded_prompts}
        return {**purposes(self.folder), **recorded}

    def offered(
        self, prompts: Any, seed: int, images: Iterable[str | os.PathLike]
    ) -> list[PromptSet]:
        """The set that was asked for, or the model's own and the one that is kept back beside it."""
        sources = [self.prompt_source if prompts is None else prompts]
        if prompts is None and self.prompt_source in HELD_OUT_SETS:
            sources.append(HELD_OUT_SETS[self.prompt_source])
        images = list(images)
        return [load_prompts(source, seed=seed, images=images) for source in sources]

    @property
    def recorded_images(self) -> dict[str, Path]:
        """Name -> file of the images of recorded prompts."""
        return {} if self.run is None else RunFolder.open(self.folder).images

    def at_steps(self, num_steps: int) -> Case:
        """The same with another number of denoising steps."""
        arguments = {**self.call.arguments, STEPS: num_steps}
        protocol = {**self.call.protocol, "num_steps": num_steps}
        return replace(self, call=replace(self.call, arguments=arguments, protocol=protocol))


def open_case(
    source: str | os.PathLike | Entry,
    *,
    model: Any,
    registry: str | os.PathLike | None,
    out: str | os.PathLike | None,
    dtype: str | None,
    device: str = "auto",
    cpu_offload: bool = False,
    allow_pickle: bool = False,
    pipe_args: Mapping[str, Any] | None = None,
    generate: Callable[..., Any] | None = None,
    modules: Any = None,
) -> Case:
    """Find entry, run and weights, and check that they belong together; nothing is loaded yet.

    ``generate`` and ``modules`` are a model of the caller's own, as the run was recorded with.
    """
    folder = _run_folder(source)
    run = None if folder is None else load_run(folder)
    entry = _entry(source, folder, registry)
    if folder is not None and out is not None and Path(out) != folder:
        raise InvalidOption(
            f"--out {out}: a run's verification goes into the run's own folder; leave --out away"
        )
    if folder is None:
        folder = entry_folder(entry, out)
    manifest = {} if run is None else run.manifest
    own = checkpoint = None
    if generate is not None:
        own = _own_session(entry, manifest, generate, modules)
        call = own.call
        weights = dict(manifest.get("checkpoint") or {"repository": entry.checkpoint.repository})
    else:
        checkpoint, weights = _checkpoint(entry, manifest, model, allow_pickle)
        call = _call(entry, manifest, checkpoint, pipe_args or {})
    num_steps = call.protocol["num_steps"]
    if not isinstance(num_steps, int) or num_steps < MIN_STEPS:
        raise InvalidOption(
            f"{num_steps!r} denoising steps: a verification needs at least {MIN_STEPS} to have something to skip"
        )
    recorded = (manifest.get("protocol") or {}).get("dtype") or entry.protocol.dtype
    loading = {"device": pick_device(device), "cpu_offload": cpu_offload}
    loading |= {"dtype": dtype or recorded or "bfloat16", "allow_pickle": allow_pickle}
    return Case(
        entry=entry,
        run=run,
        folder=folder,
        checkpoint=checkpoint,
        call=call,
        weights=weights,
        loading=loading,
        own=own,
    )


def _own_session(
    entry: Entry, manifest: Mapping[str, Any], generate: Callable[..., Any], modules: Any
) -> Session:
    """A callable under the recorded protocol."""
    stated = manifest.get("protocol") or {}
    names = ("num_steps", "guidance_scale", "height", "width", "num_frames", "call_arguments")
    settings = {name: stated.get(name, getattr(entry.protocol, name)) for name in names}
    model = str(manifest.get("model") or entry.model)
    return callable_session(model, generate, modules, settings)


def entry_folder(entry: Entry, out: str | os.PathLike | None) -> Path:
    """Where the verification of an entry without a run goes."""
    if out is not None:
        return Path(out)
    return Path("runs") / f"verify-{entry.label.replace('/', '-')}"


def _run_folder(source: str | os.PathLike | Entry) -> Path | None:
    """The run that ``source`` names, if it names one."""
    if isinstance(source, Entry) or not (Path(source) / "run.yaml").exists():
        return None
    return Path(source)


def _entry(
    source: str | os.PathLike | Entry, folder: Path | None, registry: str | os.PathLike | None
) -> Entry:
    registry = None if registry is None else Path(registry)
    if isinstance(source, Entry):
        entry = source
    elif folder is None:
        entry = coeffs.load(os.fspath(source), registry)
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
    entry: Entry, manifest: Mapping[str, Any], model: Any, allow_pickle: bool
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
        checkpoint = find_checkpoint(name, allow_pickle=allow_pickle)
    except ModelNotFound as error:
        if model:
            raise
        raise ModelNotFound(
            f"{name}: no weights of that name are known; give their folder with --model"
        ) from error
    weights = checkpoint.as_dict()
    for key in ("revision", "sha256"):
        here = weights.get(key)
        if stated.get(key) and here and stated[key] != here:
            raise InvalidOption(
                f"{name}: other weights than the run was recorded on ({key} {here[:12]} instead of "
                f"{stated[key][:12]}); give the same checkpoint with --model, or record these"
            )
    spec = known or class_defaults(checkpoint.pipeline_class)
    return replace(checkpoint, spec=spec), weights


def _call(
    entry: Entry,
    manifest: Mapping[str, Any],
    checkpoint: Checkpoint,
    pipe_args: Mapping[str, Any],
) -> Call:
    """The recorded arguments, or those of the entry's protocol; ``pipe_args`` win."""
    pipeline_call = pipeline_class_of(checkpoint).__call__
    if manifest:
        return prepare_call(
            pipeline_call, None, pipe_args={**manifest.get("call", {}), **pipe_args}
        )
    protocol = entry.protocol
    return prepare_call(
        pipeline_call,
        checkpoint.spec,
        steps=protocol.num_steps,
        guidance_scale=protocol.guidance_scale,
        height=protocol.height,
        width=protocol.width,
        num_frames=protocol.num_frames,
        pipe_args={**protocol.call_arguments, **pipe_args},
    )


def _identity(entry: Entry, session: Session, weights: dict[str, Any]) -> dict[str, Any]:
    classes = [type(module).__name__ for module in session.modules.values()]
    if entry.transformer_class and entry.transformer_class not in classes:
        raise InvalidOption(
            f"{entry.label} is for {entry.transformer_class}, but the pipeline has {', '.join(classes)}; "
            "its coefficients mean nothing there"
        )
    first = next(next(iter(session.modules.values())).parameters())
    return {
        "classes": classes,
        "weights": weights,
        "dtype": str(first.dtype),
        "device": str(first.device.type),
    }
