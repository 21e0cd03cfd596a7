"""What a manifest says about how its run was made, and what is told when that changes."""

import logging
import os
import platform
import resource
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from calibrate.model.call import Call, call_text
from calibrate.model.checkpoint import Checkpoint
from calibrate.model.loading import pick_device
from calibrate.model.prompts import PromptSet
from calibrate.recording.launch import rank, world_size
from calibrate.runs.folder import RunFolder
from calibrate.runs.pairs import seconds_per_prompt
from calibrate.text import block, duration, volume

logger = logging.getLogger(__name__)


def command_line(
    model: Any,
    options: Mapping[str, Any],
    images: Sequence[Any],
    dtype: str,
    pipe_args: Mapping[str, Any],
) -> str:
    """The command that records the same again: no option at its default, and no machine's path.

    What has no place on a command line (a loaded pipeline, a list of prompts) is left out.
    """
    given = [("model", model), *options.items(), *(("image", image) for image in images)]
    if dtype != "bfloat16":
        given.append(("dtype", dtype))
    given += [("pipe-arg", f"{name}={value}") for name, value in pipe_args.items()]
    words = ["calibrate", "record"]
    for name, value in given:
        if isinstance(value, str | int | float | Path):
            text = str(value)
            shown = Path(text).name if os.path.exists(text) else text
            words += [f"--{name.replace('_', '-')}", shown]
    return shlex.join(words)


def now() -> dict[str, Any]:
    """When and with which versions."""
    from calibrate import __version__

    packages = {name: version(name) for name in ("torch", "diffusers", "numpy")}
    versions = {"teacal": __version__, **packages, "python": platform.python_version()}
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
    }


def tell(text: str) -> None:
    """On stderr, once for all ranks."""
    if rank() == 0:
        sys.stderr.write(f"{text}\n")


def announcement(
    checkpoint: Checkpoint,
    call: Call,
    prompts: PromptSet,
    dtype: str,
    device: str,
    out: Any,
) -> str:
    """What a recording is going to do, before the weights are loaded.

    What a generation itself needs depends on the size of its tensors, which the first prompt shows.
    """
    from calibrate.recording.inner_products import OUTPUT_BYTES

    loaded = checkpoint.pipeline is not None
    place = "as loaded" if loaded else f"on {pick_device(device)}"
    protocol = {**call.protocol, "dtype": None if loaded else dtype}
    size = checkpoint.weights_bytes
    count, total = len(prompts.prompts), prompts.total
    rest = f"{total - count} more in it: --num-prompts {total} adds them to the run"
    kept = f"outputs up to {volume(OUTPUT_BYTES)} a denoiser; the peak is said after the first prompt"
    facts = {
        "model": f"{checkpoint.repository}, {checkpoint.pipeline_class}",
        "settings of": checkpoint.recognised,
        "call": f"{call_text(protocol)} {place}",
        "prompts": f"{count} of {prompts.name}" + (f"; {rest}" if total > count else ""),
        "memory": f"{volume(size)} of weights on disk; {kept}" if size else "",
        "folder": str(out or "runs/<model>-<hash>, named when the model is loaded"),
    }
    return block("record: every step computed, nothing cached", facts)


def outlook(run: RunFolder, anew: Collection[str]) -> str:
    """How much is left to record, and how long it will take where earlier prompts tell."""
    todo = len(run.missing()) + len(anew)
    seconds = seconds_per_prompt(run)
    known = (
        f"about {duration(seconds * todo)}" if seconds else "how long is said after the first"
    )
    time = f", {known}" if todo else ""
    again = f", {len(anew)} of them again for their Gram matrices" if anew else ""
    return f"{run.path}: {todo} of {len(run.groups)} prompts to record{again}{time}"


def costs(seconds: float, todo: int, held: int, kept: int) -> str:
    """What the first prompt of this start took, and what that says about the rest; once for all ranks.

    ``held`` are the bytes that the recorder held at the end of it, ``kept`` those of its latents on disk.
    """
    import torch

    rest = (
        f", about {duration(seconds * todo / world_size())} for the {todo} left"
        if todo
        else ""
    )
    if torch.cuda.is_available():
        peak = f"{volume(torch.cuda.max_memory_allocated())} of the GPU's memory at most"
    else:
        kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = f"{volume(1024 * kibibytes)} of memory at most"
    disk = f"; {volume(kept)} of latents on disk a prompt, for planning" if kept else ""
    return f"first prompt: {duration(seconds)}{rest}; {peak}, {volume(held)} of it the recorder's{disk}"


def tell_lacking(path: Path, lacking: int, finished: int) -> None:
    """Say how a run gets the Gram matrices that it was begun without."""
    if rank() != 0:
        return
    logger.warning(
        "%s: %d of %d recorded prompts have no Gram matrices, which `calibrate plan` needs; the same command with "
        "--gram records them again for it, and leaves their pairs as they are",
        path,
        lacking,
        finished,
    )


def tell_changes(run: RunFolder, facts: Mapping[str, Any]) -> None:
    """Warn where a continued run was begun with other versions or on another device."""
    for name in ("versions", "device"):
        begun = run.manifest.get(name)  # the same for a run just begun
        if begun != facts[name]:
            logger.warning(
                "%s: begun with %s %s, continued with %s",
                run.path,
                name,
                begun,
                facts[name],
            )


def tell_tidied(path: Path, moved: Sequence[str]) -> None:
    """Warn about damaged files that were set aside."""
    for group in moved:
        logger.warning(
            "%s: %s: its pairs could not be read; set aside in corrupt/ and recorded anew",
            path,
            group,
        )
