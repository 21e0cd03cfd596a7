"""Options that the commands share."""

from collections.abc import Callable

import click

EMBEDDED_MODEL = "tiny-longcat-image"

_RECORDING_OPTIONS = (
    click.option(
        "--model",
        default=EMBEDDED_MODEL,
        metavar="NAME|FOLDER",
        help="Alias (such as LongCat-Image), diffusers folder or hub id.",
        show_default=True,
    ),
    click.option(
        "--prompts", metavar="FILE|SET", help="Text (one a line), JSON lines, or a shipped set."
    ),
    click.option("--num-prompts", type=click.IntRange(min=1), help="Only the first N prompts."),
    click.option(
        "--seed",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Of the first prompt.",
    ),
    click.option("--steps", type=int, help="Denoising steps, at least 2."),
    click.option("--guidance-scale", type=float, help="Classifier-free or distilled."),
    click.option("--height", type=click.IntRange(min=1), help="Pixels."),
    click.option("--width", type=click.IntRange(min=1), help="Pixels."),
    click.option("--num-frames", type=click.IntRange(min=1), help="Frames of a video."),
    click.option(
        "--image",
        "images",
        multiple=True,
        type=click.Path(exists=True),
        help="Image to edit or animate, or a folder of them; repeat for several, which go round the prompts.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["bfloat16", "float16", "float32"]),
        default="bfloat16",
        show_default=True,
        help="Of weights and activations.",
    ),
    click.option(
        "--device",
        default="auto",
        metavar="auto|cpu|cuda",
        show_default=True,
        help="Where the model runs.",
    ),
    click.option(
        "--out",
        type=click.Path(file_okay=False),
        metavar="RUN",
        help="Run folder [runs/<model>-<hash>].",
    ),
    click.option(
        "--pipe-arg",
        "pipe_args",
        multiple=True,
        metavar="KEY=VALUE",
        help="Further pipeline argument.",
    ),
    click.option(
        "--gram",
        is_flag=True,
        help="Also keep the inner products of all steps, for `calibrate plan`.",
    ),
    click.option(
        "--cpu-offload", is_flag=True, help="Keep on the GPU only the component that is running."
    ),
    click.option(
        "--allow-pickle", is_flag=True, help="Load pickled weights too, which can run code."
    ),
)


def recording_options(command: Callable) -> Callable:
    """The options of everything that records: they arrive as the keyword arguments of `calibrate.record`."""
    for option in reversed(_RECORDING_OPTIONS):
        command = option(command)
    return command
