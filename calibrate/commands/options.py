"""Options that the commands share, and numbers in lists. The group shows every default in the help."""

from collections.abc import Callable
from typing import Any

import click
from click import option

from calibrate.model.loading import DTYPES
from calibrate.model.table import DEFAULT_PROMPTS, EMBEDDED_MODEL
from coeffs.errors import CoeffsError, did_you_mean

FOLDER = click.Path(file_okay=False)
POSITIVE = click.IntRange(min=1)
DEGREE = click.IntRange(1, 6)


class OneOf(click.Choice[str]):
    """A choice that is refused in one line, with the name that was probably meant."""

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        if value in self.choices:
            return value
        hint = did_you_mean(value, self.choices)
        known = f"is not one of {', '.join(map(repr, self.choices))}"
        option = f"{param.opts[0]}: " if param else ""
        raise CoeffsError(f"{option}{value!r} {f'is not known: {hint}' if hint else known}")


def numbers(kind: type, expected: str) -> Callable[[str], list]:
    """A parameter's type: numbers separated by commas."""

    def convert(text: str) -> list:
        try:
            return [kind(part) for part in text.replace(",", " ").split()]
        except ValueError:
            raise click.BadParameter(f"{text!r}: expected {expected}") from None

    return convert


WHOLE_NUMBERS = numbers(int, "whole numbers separated by commas, such as 14,10,8")
NUMBERS = numbers(float, "numbers separated by commas, such as 0.1,0.2")


def _parsed(
    ctx: click.Context, param: click.Parameter, value: tuple[str, ...]
) -> dict[str, Any]:
    from calibrate.model.call import parse_pipe_args

    return parse_pipe_args(value)


def _group(*options: Callable) -> Callable:
    """One decorator for several options, which the help shows in this order."""

    def decorate(command: Callable) -> Callable:
        for decorator in reversed(options):
            command = decorator(command)
        return command

    return decorate


registry = option(
    "--registry", type=FOLDER, metavar="FOLDER", help="Registry folder that is asked first."
)
_seed = option("--seed", type=click.IntRange(min=0), default=0, help="Of the first prompt.")
_image = option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(exists=True),
    help="Image to edit or animate, or a folder of them; repeat for several, which go round the prompts.",
)
# How the weights are loaded and called: the same for everything that runs a model.
_session = _group(
    option("--device", default="auto", metavar="auto|cpu|cuda", help="Where the model runs."),
    option(
        "--pipe-arg",
        "pipe_args",
        multiple=True,
        callback=_parsed,
        metavar="KEY=VALUE",
        help="Further pipeline argument.",
    ),
    option(
        "--cpu-offload",
        is_flag=True,
        help="Keep on the GPU only the component that is running.",
    ),
    option(
        "--allow-pickle", is_flag=True, help="Load pickled weights too, which can run code."
    ),
)
# They arrive as the keyword arguments of `calibrate.record`.
recording_options = _group(
    option(
        "--model",
        default=EMBEDDED_MODEL,
        metavar="NAME|FOLDER",
        help="Alias (`calibrate models` lists them), diffusers folder or hub id.",
    ),
    option(
        "--prompts",
        metavar="FILE|SET",
        help="Text (one a line), JSON lines, or a shipped set.",
    ),
    option(
        "--num-prompts",
        type=POSITIVE,
        help=f"Only the first N prompts; more continue a run [default: {DEFAULT_PROMPTS} of a shipped set, all of a "
        "file].",
    ),
    _seed,
    option("--steps", type=int, help="Denoising steps, at least 2."),
    option("--guidance-scale", type=float, help="Classifier-free or distilled."),
    option("--height", type=POSITIVE, help="Pixels."),
    option("--width", type=POSITIVE, help="Pixels."),
    option("--num-frames", type=POSITIVE, help="Frames of a video."),
    _image,
    option(
        "--dtype",
        type=click.Choice(DTYPES),
        default="bfloat16",
        help="Of weights and activations.",
    ),
    option("--out", type=FOLDER, metavar="RUN", help="Run folder [runs/<model>-<hash>]."),
    option(
        "--gram/--no-gram",
        default=None,
        help="Keep the inner products and latents of all steps, which `calibrate plan` needs, or not [default: "
        "keep; a run begun without stays without]. --gram also records anew what lacks them.",
    ),
    _session,
)
# Of everything that runs a recorded model again.
rerunning_options = _group(
    option(
        "--model",
        metavar="NAME|FOLDER",
        help="Weights to run [default: those of the run or the entry].",
    ),
    option(
        "--prompts",
        metavar="FILE|SET",
        help="Held-out prompts; recorded ones are left out [default: the model's].",
    ),
    _seed,
    _image,
    option("--dtype", type=click.Choice(DTYPES), help="[default: as recorded]"),
    _session,
)
