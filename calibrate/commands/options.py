"""Options that the commands share, and numbers in lists."""

from collections.abc import Callable
from typing import Any

import click

from calibrate.model.table import DEFAULT_PROMPTS, EMBEDDED_MODEL

DTYPES = click.Choice(["bfloat16", "float16", "float32"])
POSITIVE = click.IntRange(min=1)


class Numbers(click.ParamType):
    """Comma-separated numbers."""

    name = "list"

    def __init__(self, kind: type) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list:
        try:
            return [self._kind(part) for part in value.replace(" ", ",").split(",") if part]
        except ValueError:
            expected = "numbers separated by commas, such as 0.1,0.2"
            if self._kind is int:
                expected = "whole numbers separated by commas, such as 14,10,8"
            self.fail(f"{value!r}: expected {expected}")


def _parsed(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> dict[str, Any]:
    from calibrate.model.call import parse_pipe_args

    return parse_pipe_args(value)


registry = click.option(
    "--registry",
    type=click.Path(file_okay=False),
    metavar="FOLDER",
    help="Registry folder that is asked first.",
)
_SEED = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the first prompt."
)
_IMAGE = click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(exists=True),
    help="Image to edit or animate, or a folder of them; repeat for several, which go round the prompts.",
)
# How the weights are loaded and called: the same for everything that runs a model.
_SESSION = (
    click.option(
        "--device",
        default="auto",
        metavar="auto|cpu|cuda",
        show_default=True,
        help="Where the model runs.",
    ),
    click.option(
        "--pipe-arg",
        "pipe_args",
        multiple=True,
        callback=_parsed,
        metavar="KEY=VALUE",
        help="Further pipeline argument.",
    ),
    click.option(
        "--cpu-offload", is_flag=True, help="Keep on the GPU only the component that is running."
    ),
    click.option(
        "--allow-pickle", is_flag=True, help="Load pickled weights too, which can run code."
    ),
)
_RECORDING = (
    click.option(
        "--model",
        default=EMBEDDED_MODEL,
        metavar="NAME|FOLDER",
        help="Alias (`calibrate models` lists them), diffusers folder or hub id.",
        show_default=True,
    ),
    click.option(
        "--prompts", metavar="FILE|SET", help="Text (one a line), JSON lines, or a shipped set."
    ),
    click.option(
        "--num-prompts",
        type=POSITIVE,
        help=f"Only the first N prompts; more continue a run [default: {DEFAULT_PROMPTS} of a shipped set, all of a "
        "file].",
    ),
    _SEED,
    click.option("--steps", type=int, help="Denoising steps, at least 2."),
    click.option("--guidance-scale", type=float, help="Classifier-free or distilled."),
    click.option("--height", type=POSITIVE, help="Pixels."),
    click.option("--width", type=POSITIVE, help="Pixels."),
    click.option("--num-frames", type=POSITIVE, help="Frames of a video."),
    _IMAGE,
    click.option(
        "--dtype",
        type=DTYPES,
        default="bfloat16",
        show_default=True,
        help="Of weights and activations.",
    ),
    click.option(
        "--out",
        type=click.Path(file_okay=False),
        metavar="RUN",
        help="Run folder [runs/<model>-<hash>].",
    ),
    click.option(
        "--gram/--no-gram",
        default=None,
        help="Keep the inner products of all steps, which `calibrate plan` needs, or not [default: keep; a run "
        "begun without stays without]. --gram also records anew what lacks them.",
    ),
    *_SESSION,
)
_RERUNNING = (
    click.option(
        "--model",
        metavar="NAME|FOLDER",
        help="Weights to run [default: those of the run or the entry].",
    ),
    click.option(
        "--prompts",
        metavar="FILE|SET",
        help="Held-out prompts; recorded ones are left out [default: the model's].",
    ),
    _SEED,
    _IMAGE,
    click.option("--dtype", type=DTYPES, help="[default: as recorded]"),
    *_SESSION,
)


def recording_options(command: Callable) -> Callable:
    """The options of everything that records: they arrive as the keyword arguments of `calibrate.record`."""
    return _with(_RECORDING, command)


def rerunning_options(command: Callable) -> Callable:
    """The options of everything that runs a recorded model again."""
    return _with(_RERUNNING, command)


def _with(options: tuple[Callable, ...], command: Callable) -> Callable:
    for option in reversed(options):
        command = option(command)
    return command
