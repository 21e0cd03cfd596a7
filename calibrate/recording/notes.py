"""What a manifest says about how its run was made, and what is told when that changes."""

import logging
import platform
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from calibrate.runs.folder import RunFolder

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
    given.append(("dtype", None if dtype == "bfloat16" else dtype))
    given += [("pipe-arg", f"{name}={value}") for name, value in pipe_args.items()]
    words = ["calibrate", "record"]
    for name, value in given:
        if isinstance(value, (str, int, float, Path)):
            text = str(value)
            shown = Path(text).name if Path(text).exists() else text
            words += [f"--{name.replace('_', '-')}", shown]
    return shlex.join(words)


def now() -> dict[str, Any]:
    """When and with which versions."""
    from calibrate import __version__

    packages = {name: version(name) for name in ("torch", "diffusers", "numpy")}
    versions = {"teacal": __version__, **packages, "python": platform.python_version()}
    return {"created": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions}


def tell_changes(run: RunFolder, facts: Mapping[str, Any]) -> None:
    """Warn where a continued run was begun with other versions or on another device."""
    for name in ("versions", "device"):
        begun = run.manifest.get(name)  # the same for a run just begun
        if begun != facts[name]:
            logger.warning(
                "%s: begun with %s %s, continued with %s", run.path, name, begun, facts[name]
            )


def tell_tidied(path: Path, moved: Sequence[str]) -> None:
    """Warn about damaged files that were set aside."""
    for group in moved:
        logger.warning(
            "%s: %s: its pairs could not be read; set aside in corrupt/ and recorded anew",
            path,
            group,
        )
