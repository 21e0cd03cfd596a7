"""Recording: run the whole uncached denoising for every prompt, and keep the pairs of each one that finishes."""

import gc
import logging
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

from calibrate.errors import CalibrateError, Incomplete, InvalidOption, RunFolderError
from calibrate.model.call import MIN_STEPS, prepare_call
from calibrate.model.checkpoint import DTYPES, find_checkpoint, pipeline_class_of
from calibrate.model.prompts import PromptSet, load_prompts
from calibrate.model.protocol import canonical_sha256, plain
from calibrate.model.session import Session, callable_session, load_session
from calibrate.recording.launch import Party, rank, restarts, world_size
from calibrate.runs.folder import Group, RunFolder, tidy
from calibrate.runs.lock import RunLock, job_name
from coeffs.errors import CoeffsError
from runtime.errors import RuntimeCacheError

EMBEDDED_MODEL = "tiny-longcat-image"
_SAME_FAILURES = (
    3  # this many first prompts failing alike mean that the call is wrong, not the prompts
)
_WAIT_SECONDS = 0.2  # between looks at the groups that other ranks are recording
_EXPECTED = (CalibrateError, CoeffsError, RuntimeCacheError)

logger = logging.getLogger(__name__)


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
    generate: Callable[[str, int], Any] | None = None,
    modules: Any = None,
    blocks: Sequence[str] | None = None,
    gram: bool = False,
    cpu_offload: bool = False,
    allow_pickle: bool = False,
    progress: bool = True,
) -> RunFolder:
    """Record full uncached denoising of every prompt into a run folder, or continue the run that is there.

    ``model`` is an alias, a diffusers folder, a hub id, or a loaded diffusers pipeline, which is used as it is
    (``dtype`` and ``device`` are then its own). With ``generate`` and ``modules`` it is only a name:
    ``generate(prompt, seed)`` runs one whole generation through ``modules`` (one module, or expert name -> module).
    ``blocks`` names the block stack of a denoiser in which it cannot be found. ``gram`` also keeps the inner products
    of all steps, which `calibrate plan` needs: outputs and residuals of a generation are held for them, within limits.

    Prompts that fail are noted in ``failures/`` and tried again by the next call; ``is_complete`` of the returned run
    tells. Under torchrun every rank records the groups that it gets hold of, and rank 0 returns when all are there.
    Raises an error derived from `CalibrateError` for anything that cannot be recorded.
    """
    settings = {"steps": steps, "guidance_scale": guidance_scale, "height": height, "width": width}
    settings["num_frames"] = num_frames
    _check_options(settings, num_prompts, dtype)
    images, pipe_args = list(images), dict(pipe_args or {})
    named = {
        "model": model,
        "prompts": prompts,
        "num_prompts": num_prompts,
        "seed": seed or None,
        **settings,
    }
    named |= {"image": images, "dtype": None if dtype == "bfloat16" else dtype}
    command = _command_line(
        named | {"pipe_arg": [f"{key}={value}" for key, value in pipe_args.items()]}
    )

    if generate is None and callable(model) and not hasattr(model, "components"):
        model, generate = getattr(model, "__name__", type(model).__name__), model
    if generate is not None:
        prompt_set = load_prompts(prompts, seed=seed, images=images, count=num_prompts)
        settings = {"num_steps": settings.pop("steps"), **settings, "call_arguments": pipe_args}
        session = callable_session(str(model), generate, modules, settings)
    else:
        checkpoint = find_checkpoint(model, allow_pickle=allow_pickle)
        spec = checkpoint.spec
        pipeline_call = pipeline_class_of(checkpoint).__call__
        call = prepare_call(pipeline_call, spec, pipe_args=pipe_args, **settings)
        if prompts is None and spec is not None:
            prompts, num_prompts = spec.prompts, num_prompts or spec.num_prompts
        prompt_set = load_prompts(prompts, seed=seed, images=images, count=num_prompts)
        call.refuse_unfit(prompt_set.prompts)
        if checkpoint.pipeline is None and out is not None:
            _refuse_unusable(Path(out))
        session = load_session(
            checkpoint,
            call,
            dtype=dtype,
            device=device,
            allow_pickle=allow_pickle,
            cpu_offload=cpu_offload,
        )
        if checkpoint.pipeline is None:
            # One bar for the run is enough unless somebody is watching.
            session.pipeline.set_progress_bar_config(
                disable=not (progress and sys.stderr.isatty()), leave=False, position=1
            )
    from calibrate.recording.recorder import Recorder

    recorder = Recorder(session.modules, session.pipeline, blocks=blocks, gram=gram)
    return _record_all(
        session, recorder, prompt_set, out, notes={"command": command}, progress=progress
    )


def _check_options(settings: Mapping[str, Any], num_prompts: int | None, dtype: str) -> None:
    """Refuse before anything is loaded what no pipeline can take."""
    for name, value in {**settings, "num_prompts": num_prompts}.items():
        minimum = MIN_STEPS if name == "steps" else 1
        flag = f"--{name.replace('_', '-')}"
        if name == "guidance_scale":
            if value is not None and not math.isfinite(value):
                raise InvalidOption(f"{flag} {value}: expected a finite number")
        elif value is not None and value < minimum:
            raise InvalidOption(f"{flag} {value}: expected a whole number from {minimum}")
    if dtype not in DTYPES:
        raise InvalidOption(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")


def _record_all(
    session: Session,
    recorder: Any,
    prompts: PromptSet,
    out: Any,
    *,
    notes: dict[str, Any],
    progress: bool,
) -> RunFolder:
    import torch

    identity = dict(session.identity)
    run_id = canonical_sha256([identity["protocol_sha256"], prompts.sha256])[:8]
    path = Path(out) if out is not None else Path("runs") / f"{identity['model']}-{run_id}"
    _make_folder(path)

    def prepare() -> None:
        for group in tidy(path):
            logger.warning(
                "%s: its pairs could not be read; set aside in corrupt/ and recorded anew", group
            )

    with RunLock(path / "lock", job_name(), prepare) as lock:
        notes |= {
            "created": _now(),
            "versions": _versions(),
            "device": session.device_name,
            "call": plain(session.arguments),
        }
        run = RunFolder.create(path, {"run_id": run_id, **identity}, prompts, **notes)
        _say_changes(run, notes)
        party = Party(session.modules)
        loop = _Loop(run, session, recorder, lock, party)
        with torch.inference_mode(), recorder:
            if party.leads:
                with _bar(run, shown=progress and rank() == 0) as bar:
                    loop.lead(bar)
            else:
                loop.follow()
    return run


class _Loop:
    """Records what is missing in a run; with other ranks, whatever they are not at."""

    def __init__(
        self, run: RunFolder, session: Session, recorder: Any, lock: RunLock, party: Party
    ) -> None:
        self.run, self.session, self.recorder, self.lock, self.party = (
            run,
            session,
            recorder,
            lock,
            party,
        )
        self.images = run.images
        self.job = f"{lock.job}#{restarts()}"
        self.outcomes: list[str | None] = []  # a failure's text, or None for a success

    def lead(self, bar: Any) -> None:
        """Claim one group after the other until all are there, or in other hands."""
        groups = self.run.groups
        start = (
            rank() * len(groups) // world_size()
        )  # ranks begin apart and rarely reach for the same group
        groups = groups[start:] + groups[:start]
        while missing := [group for group in groups if self._is_wanted(group)]:
            recorded = [self._claim_and_record(group, bar) for group in missing]
            if not any(recorded):
                if rank() != 0:
                    break  # the rest is in other hands, and rank 0 stays until it is done
                time.sleep(_WAIT_SECONDS)
            _show(bar, self.run)
        self.party.announce(None)

    def follow(self) -> None:
        """Run the generations that the party's leading rank announces."""
        groups = self.run.groups
        while (index := self.party.follow()) is not None:
            self._record(groups[index])

    def _is_wanted(self, group: Group) -> bool:
        return not self.run.is_finished(group) and self.run.failed_in(group) != self.job

    def _claim_and_record(self, group: Group, bar: Any) -> bool:
        if not self.lock.claim(group.index):
            return False
        try:
            if not self._is_wanted(group):  # another rank was faster
                return False
            self.party.announce(group.index)
            self._record(group)
        finally:
            self.lock.release(group.index)
        _show(bar, self.run)
        if (
            len(self.outcomes) == _SAME_FAILURES
            and self.outcomes[0]
            and len(set(self.outcomes)) == 1
        ):
            self.party.announce(None)
            raise Incomplete(
                f"{self.run.path}: the first {_SAME_FAILURES} prompts all failed alike ({self.outcomes[0]}); stopped"
            )
        return True

    def _record(self, group: Group) -> None:
        """Generate and measure one group; whatever a pipeline raises costs this prompt and no other."""
        try:
            self.recorder.start()
            self.session.generate(group.prompt, self.images)
            recording = self.recorder.finish()
        except _EXPECTED:
            raise  # says what to do about the model or the run, and would be the same for every prompt
        except Exception as error:
            kind, message = _kind_of(error), " ".join((str(error) or repr(error)).split())[:500]
        else:
            kind, message = (
                ("", "")
                if recording.rows
                else ("no pairs", "the denoiser was called less than twice")
            )
        self.outcomes.append(f"{kind}: {message}" if kind else None)
        if kind:
            _free_memory()
        if self.party.leads and kind:
            self.run.write_failure(group, kind, message, self.job)
            logger.warning(
                "%s failed (%s: %s); the next start tries it again", group.name, kind, message
            )
        elif self.party.leads:
            self.run.write_group(group, recording.rows, recording.timing, recording.gram)
            if recording.non_finite:
                counts = recording.non_finite, len(recording.rows)
                logger.warning(
                    "%s: %d of %d pairs are not finite; kept, left out of every fit",
                    group.name,
                    *counts,
                )


def _kind_of(error: Exception) -> str:
    import torch

    memory = "out of memory", "can't allocate memory"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        text in str(error).lower() for text in memory
    ):
        return "out of memory"
    return type(error).__name__


def _free_memory() -> None:
    """Give back what a failed generation held, so that the next prompt has the room of the first."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _bar(run: RunFolder, shown: bool):
    from tqdm import tqdm

    total, done = len(run.groups), len(run.finished())
    with tqdm(
        total=total, initial=done, desc="recording", unit="prompt", disable=not shown, smoothing=0.1
    ) as bar:
        yield bar
        _show(bar, run)


def _show(bar: Any, run: RunFolder) -> None:
    """What all ranks have finished, not only this one."""
    bar.n = len(run.finished())
    bar.refresh()


def _refuse_unusable(path: Path) -> None:
    """Say before a model is loaded that nothing can be written there, or that somebody else is at it."""
    _make_folder(path)
    with RunLock(path / "lock", job_name()):
        pass


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"{path}: cannot be created ({error.strerror}); choose another folder with --out"
        raise RunFolderError(message) from None


def _say_changes(run: RunFolder, notes: Mapping[str, Any]) -> None:
    for name in ("versions", "device"):
        begun = run.manifest.get(name)  # the same for a run just begun
        if begun != notes[name]:
            logger.warning(
                "%s: begun with %s %s, continued with %s", run.path, name, begun, notes[name]
            )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    from calibrate import __version__

    packages = {name: version(name) for name in ("torch", "diffusers", "numpy")}
    return {"teacal": __version__, **packages, "python": platform.python_version()}


def _command_line(options: Mapping[str, Any]) -> str:
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
