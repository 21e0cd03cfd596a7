"""What real runs are made of: an entry, the run it came from where there is one, and the loaded session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import coeffs
from calibrate.errors import InvalidOption, ModelNotFound
from calibrate.model.call import Call, prepare_call, recorded_arguments
from calibrate.model.checkpoint import Checkpoint, find_checkpoint, pipeline_class_of
from calibrate.model.loading import pick_device
from calibrate.model.prompts import HELD_OUT_SETS, Prompt, PromptSet, load_prompts
from calibrate.model.session import STEPS, Session, callable_session, load_session
from calibrate.model.table import class_defaults, find_model
from calibrate.runs.folder import RunFolder
from calibrate.runs.lock import Source, folder_of
from calibrate.runs.pairs import Run, load_run, seconds_per_prompt
from calibrate.runs.purposes import RECORDED, purposes
from calibrate.text import duration
from coeffs import Entry

MIN_STEPS = 3  # the first step computes; of two there is nothing to compare
SIZES = ("guidance_scale", "height", "width", "num_frames")
PROTOCOL_OF_OWN = ("num_steps", *SIZES, "call_arguments")

Prompts = str | os.PathLike | Sequence[str] | None
Images = Iterable[str | os.PathLike]
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that stays the same during a verification or a planning.

    The weights are loaded when ``session`` is asked for first, so that every setting can be checked before.

    Attributes:
        manifest: Of the run; empty for an entry without one.
        folder: Where ``verify/`` and the entry go.
        weights: What is known of the checkpoint's weights.
        loading: Options of :func:`calibrate.model.session.load_session`.
        own: The model where the caller drives it; there is no checkpoint then.
    """

    entry: Entry
    run: Run | None
    manifest: Mapping[str, Any]
    folder: Path
    call: Call
    weights: dict[str, Any]
    checkpoint: Checkpoint | None = None
    loading: Mapping[str, Any] = field(default_factory=dict)
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
        spec = self.checkpoint and self.checkpoint.spec
        return spec.prompts if spec else "default"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a sample depends on besides arguments and prompt: model, weights, dtype, device."""
        deployed = self.session.deployed
        wanted, classes = self.entry.transformer_class, deployed["classes"]
        if wanted and wanted not in classes:
            raise InvalidOption(
                f"{self.entry.label} is for {wanted}, but the pipeline has {', '.join(classes)}; "
                "its coefficients mean nothing there"
            )
        return {**deployed, "weights": self.weights}

    @property
    def recorded_prompts(self) -> list[Prompt]:
        """The prompts of the run."""
        return [Prompt.from_dict(row) for row in self.manifest.get("prompts", ())]

    @property
    def purposes(self) -> dict[str, str]:
        """What each prompt was used for: prompt id -> purpose."""
        recorded = {prompt.prompt_id: RECORDED for prompt in self.recorded_prompts}
        return {**purposes(self.folder), **recorded}

    def offered(
        self, prompts: Prompts, seed: int, images: Images, *further: Mapping[str, str]
    ) -> list[PromptSet]:
        """The set that was asked for, or the model's own and those that are kept back beside it."""
        own, images = self.prompt_source, list(images)
        sources = [own, *(kept_back.get(own) for kept_back in (HELD_OUT_SETS, *further))]
        return [
            load_prompts(source, seed=seed, images=images)
            for source in (sources if prompts is None else [prompts])
            if source
        ]

    def time_of(self, runs: float) -> str:
        """How long so many uncached runs take, for an announcement; empty where nothing was timed."""
        seconds = self.run and seconds_per_prompt(RunFolder.open(self.folder))
        return f"; about {duration(seconds * runs)} by the recorded timing" if seconds else ""

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
    source: Source,
    *,
    model: Any = None,
    registry: str | Path | None = None,
    out: str | os.PathLike | None = None,
    dtype: str | None = None,
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
    recorded = None if isinstance(source, Entry) else Path(source)
    if recorded is not None and not (recorded / "run.yaml").exists():
        recorded = None
    run = None if recorded is None else load_run(recorded)
    entry = _entry(source, recorded, registry)
    folder = folder_of(recorded or entry, registry, out)
    if out is not None and Path(out) != folder:
        raise InvalidOption(
            f"--out {out}: a run's verification goes into the run's own folder; leave --out away"
        )
    manifest = {} if run is None else run.manifest
    name = str(manifest.get("model") or entry.model)
    weights = dict(manifest.get("checkpoint") or {"repository": entry.checkpoint.repository})
    protocol = manifest.get("protocol") or vars(entry.protocol)
    own = checkpoint = None
    if generate is not None:
        settings = {name: protocol.get(name) for name in PROTOCOL_OF_OWN}
        own = callable_session(name, generate, modules, settings)
        call = own.call
    else:
        checkpoint, weights = _checkpoint(name, weights, model, allow_pickle)
        call = _call(entry, manifest, checkpoint, pipe_args or {})
    case = Case(
        entry=entry,
        run=run,
        manifest=manifest,
        folder=folder,
        call=call,
        weights=weights,
        checkpoint=checkpoint,
        loading={
            "device": pick_device(device),
            "cpu_offload": cpu_offload,
            "dtype": dtype or protocol.get("dtype") or "bfloat16",
            "allow_pickle": allow_pickle,
        },
        own=own,
    )
    if not isinstance(case.num_steps, int) or case.num_steps < MIN_STEPS:
        raise InvalidOption(
            f"{case.num_steps!r} denoising steps: a verification needs at least {MIN_STEPS} to have something to skip"
        )
    return case


def _entry(source: Source, run: Path | None, registry: str | Path | None) -> Entry:
    if isinstance(source, Entry):
        entry = source
    else:
        file = run / "entry.yaml" if run else None
        if file is not None and not file.exists():
            raise InvalidOption(
                f"{run}: no entry.yaml in it yet; run `calibrate fit {run}` first, in Python "
                f'coeffs.save(calibrate.fit("{run}"), "{file}")'
            )
        entry = coeffs.load(file or os.fspath(source), registry)
    if not entry.has_polynomials:
        raise InvalidOption(
            f"{entry.label}: no coefficients in it, only ratios or plans; nothing to verify with a gate"
        )
    return entry


def _checkpoint(
    label: str, recorded: dict[str, Any], model: Any, allow_pickle: bool
) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint to run, and what is known of its weights; other weights than the recorded ones are refused."""
    known = find_model(label)
    name = model or (known and known.alias) or recorded.get("repository")
    if not name:
        raise InvalidOption(f"{label}: it names no checkpoint; give the model with --model")
    try:
        checkpoint = find_checkpoint(name, allow_pickle=allow_pickle)
    except ModelNotFound as error:
        if model:
            raise
        raise ModelNotFound(
            f"{name}: no weights of that name are known; give their folder with --model"
        ) from error
    if checkpoint.pipeline is not None:
        return replace(checkpoint, spec=known or checkpoint.spec), recorded
    weights = checkpoint.as_dict()
    for key in ("revision", "sha256"):
        here, there = weights.get(key), recorded.get(key)
        if there and here and there != here:
            raise InvalidOption(
                f"{name}: other weights than the run was recorded on ({key} {here[:12]} instead of "
                f"{there[:12]}); give the same checkpoint with --model, or record these"
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
        recorded = {**manifest.get("call", {}), **pipe_args}
        return prepare_call(pipeline_call, None, pipe_args=recorded)
    protocol = vars(entry.protocol)
    return prepare_call(
        pipeline_call,
        checkpoint.spec,
        steps=protocol["num_steps"],
        pipe_args={**recorded_arguments(protocol), **pipe_args},
        **{size: protocol[size] for size in SIZES},
    )
