"""Recording: the whole uncached denoising of every prompt, of which the pairs of consecutive steps are kept."""

import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from calibrate.errors import InvalidOption
from calibrate.model.call import MIN_STEPS, prepare_call
from calibrate.model.checkpoint import find_checkpoint, pipeline_class_of
from calibrate.model.loading import DTYPES
from calibrate.model.prompts import PromptSet, load_prompts, shipped_sets
from calibrate.model.protocol import canonical_sha256, plain
from calibrate.model.session import Session, callable_session, load_session
from calibrate.model.table import DEFAULT_PROMPTS, EMBEDDED_MODEL
from calibrate.recording import notes
from calibrate.recording.launch import Party, rank
from calibrate.recording.loop import Loop
from calibrate.runs.folder import RunFolder, tidy
from calibrate.runs.lock import hold
from calibrate.runs.trajectory import trajectory_folder


def record(
    model: Any = EMBEDDED_MODEL,
    *,
    prompts: str | os.PathLike | Sequence[str] | None = None,
    num_prompts: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    images: Iterable[str | os.PathLike] = (),
    dtype: str = "bfloat16",
    device: str = "auto",
    out: str | os.PathLike | None = None,
    pipe_args: Mapping[str, Any] | None = None,
    generate: Callable[..., Any] | None = None,
    modules: Any = None,
    blocks: Sequence[str] | None = None,
    gram: bool | None = None,
    cpu_offload: bool = False,
    allow_pickle: bool = False,
    progress: bool = True,
) -> RunFolder:
    """Record full uncached denoising of every prompt into a run folder, or continue the run that is there.

    Prompts that fail are noted in ``failures/`` and tried again by the next call; ``is_complete`` of the returned run
    tells. Under torchrun every rank records the groups that it gets hold of, and rank 0 returns when all are there.

    Args:
        model: An alias, a diffusers folder, a hub id, or a loaded diffusers pipeline, which is used as it is
            (``dtype`` and ``device`` are then its own). With ``generate`` and ``modules`` only a name.
        prompts: A file, a shipped set or texts; by default the model's own set.
        generate: ``generate(prompt, seed)`` runs one whole generation through ``modules``. What it returns can be
            verified: an image (height, width, channels), a video (frames first) or series (channels, values). Where it
            also takes ``num_steps``, fewer steps can be compared with; where it takes ``scheduler``, it is given that
            of ``modules`` or a copy to use in its place.
        modules: One module, expert name -> module, or a :class:`runtime.OwnLoop` that also holds the scheduler.
        blocks: Names the block stack of a denoiser in which it cannot be found.
        gram: Keep the inner products and latents of all steps, which `calibrate plan` needs: the outputs of a
            generation are held for them, within limits. By default kept, except in a run begun without; True also
            records anew what lacks them.

    Raises:
        CalibrateError, CoeffsError, RuntimeCacheError: What cannot be recorded, and why.
    """
    settings: dict[str, Any] = {
        "steps": steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
        "num_frames": num_frames,
    }
    _check_options({**settings, "num_prompts": num_prompts}, dtype, out)
    images, pipe_args = list(images), dict(pipe_args or {})
    options = {
        "prompts": prompts,
        "num_prompts": num_prompts,
        "seed": seed or None,
        **settings,
    }
    command = notes.command_line(model, options, images, dtype, pipe_args)
    if generate is None and callable(model) and not hasattr(model, "components"):
        model, generate = getattr(model, "__name__", type(model).__name__), model
    if generate is not None:
        prompt_set = _prompts(prompts, num_prompts, seed, images)
        settings["num_steps"] = settings.pop("steps")
        settings["call_arguments"] = pipe_args
        session = callable_session(str(model), generate, modules, settings, blocks)
    else:
        checkpoint = find_checkpoint(model, allow_pickle=allow_pickle)
        spec = checkpoint.spec
        call = prepare_call(
            pipeline_class_of(checkpoint).__call__, spec, pipe_args=pipe_args, **settings
        )
        if prompts is None and spec is not None:
            prompts, num_prompts = spec.prompts, num_prompts or spec.num_prompts
        prompt_set = _prompts(prompts, num_prompts, seed, images)
        call.refuse_unfit(prompt_set.prompts)
        if out is not None:
            with hold(
                out
            ):  # said before gigabytes are read: unwritable, or somebody else is at it
                pass
        if progress:
            notes.tell(notes.announcement(checkpoint, call, prompt_set, dtype, device, out))
        weights = {"allow_pickle": allow_pickle, "cpu_offload": cpu_offload}
        session = load_session(checkpoint, call, dtype=dtype, device=device, **weights)
        if checkpoint.pipeline is None:
            # One bar for the run is enough unless somebody is watching.
            session.pipeline.set_progress_bar_config(
                disable=not (progress and sys.stderr.isatty()), leave=False, position=1
            )
    return _record_all(session, prompt_set, out, command, gram, progress)


def _record_all(
    session: Session,
    prompts: PromptSet,
    out: str | os.PathLike | None,
    command: str,
    gram: bool | None,
    progress: bool,
) -> RunFolder:
    import torch
    from tqdm import tqdm

    from calibrate.recording.recorder import Recorder

    run_id = canonical_sha256([session.identity["protocol_sha256"], prompts.sha256])[:8]
    path = Path(out or Path("runs") / f"{session.identity['model']}-{run_id}")
    with_gram, anew = _gram_setting(path, gram)
    recorder = Recorder(session.modules, session.driver, session.blocks, gram=with_gram)
    with hold(path, prepare=lambda: notes.tell_tidied(path, tidy(path))) as lock:
        facts = {"command": command, **notes.now(), "device": session.device_name}
        facts["call"] = plain(session.arguments)
        run = RunFolder.create(path, {"run_id": run_id, **session.identity}, prompts, **facts)
        notes.tell_changes(run, facts)
        if progress:
            notes.tell(notes.outlook(run, anew))
        party, trajectories = Party(session.modules), None
        if session.solver_is_replaceable:
            identity = {**session.deployed, "weights": session.identity["checkpoint"]}
            trajectories = trajectory_folder(path, identity, session.arguments)
        loop = Loop(run, session, recorder, lock, party, trajectories, anew)
        bar = tqdm(
            total=len(run.groups),
            initial=len(run.finished()),
            desc="recording",
            unit="prompt",
            disable=not (progress and party.leads and rank() == 0),
            smoothing=0.1,
        )
        with torch.inference_mode(), recorder, bar:
            if party.leads:
                loop.lead(bar)
            else:
                loop.follow()
    return run


def _check_options(
    settings: Mapping[str, Any], dtype: str, out: str | os.PathLike | None
) -> None:
    """Refuse before anything is loaded what no pipeline can take."""
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if value is not None and not math.isfinite(value):
            raise InvalidOption(f"{flag} {value}: expected a finite number")
        least = MIN_STEPS if name == "steps" else 1
        if value is not None and value < least and name != "guidance_scale":
            raise InvalidOption(f"{flag} {value}: expected a whole number from {least}")
    if dtype not in DTYPES:
        raise InvalidOption(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    if out is not None and not os.fspath(out):
        raise InvalidOption("--out: empty; give a folder, or leave it away")


def _prompts(source: Any, count: int | None, seed: int, images: Sequence[Any]) -> PromptSet:
    """The prompts to record; of a shipped set by default as many as the fit needs."""
    prompts = load_prompts(source, seed=seed, images=images)
    if count is None and (source is None or str(source) in shipped_sets()):
        count = min(DEFAULT_PROMPTS, prompts.total)
    return prompts.first(count)


def _gram_setting(path: Path, gram: bool | None) -> tuple[bool, set[str]]:
    """Whether Gram matrices are kept, and which finished groups are recorded anew for them."""
    run = RunFolder(path, {})
    finished = run.finished()
    lacking = finished - run.with_gram()
    if gram:
        return True, lacking
    if gram is None and lacking:
        notes.tell_lacking(path, len(lacking), len(finished))
        gram = lacking != finished
    return gram is not False, set()
