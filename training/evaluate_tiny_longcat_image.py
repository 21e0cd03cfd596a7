"""Measure whether a model of coloured digits, `tiny-longcat-image` or `tiny-sd3`, obeys its prompts.

    python -m training.evaluate_tiny_longcat_image [FOLDER] [--grid GRID.png]

Samples captions that cover digits and colours evenly through the real pipeline and reads the pictures back with
`training.tiny_longcat_image.reading`. Results go to stdout, progress to stderr; the exit status is 1 if digits, inks
or papers are right in less than 90 % of the samples. 100 samples take some minutes on two CPU cores.
"""

import inspect
import sys
import time
from collections import Counter
from pathlib import Path

import click
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from training.folders import load_finished
from training.tiny_longcat_image.autoencoder import reconstruction_psnr
from training.tiny_longcat_image.data import (
    IMAGE_SIZE,
    Caption,
    digit_masks,
    evenly_ordered_captions,
)
from training.tiny_longcat_image.reading import (
    DigitReader,
    Reading,
    expected_names,
    nearest_neighbours,
)

EMBEDDED = (
    Path(__file__).resolve().parents[1] / "calibrate" / "embedded" / "tiny-longcat-image"
)
REQUIRED_ACCURACY = 0.9
GRID_COLUMNS = 20
GRID_ZOOM = 2


def own_arguments(pipeline: DiffusionPipeline) -> dict[str, bool]:
    """The call arguments that not every pipeline has."""
    # The captions are the model's own: nothing is to be rewritten.
    wanted = {"enable_prompt_rewrite": False}
    accepted = inspect.signature(pipeline.__call__).parameters
    return {name: value for name, value in wanted.items() if name in accepted}


def sample(
    pipeline: DiffusionPipeline,
    captions: list[Caption],
    steps: int,
    guidance: float,
    batch: int,
    first_seed: int,
) -> np.ndarray:
    """One picture per caption, [N, 32, 32, 3] in 0..1; picture k has seed `first_seed` + k whatever the batch size."""
    pictures = []
    started = time.monotonic()
    for start in range(0, len(captions), batch):
        chunk = captions[start : start + batch]
        seeds = range(first_seed + start, first_seed + start + len(chunk))
        pictures.append(
            pipeline(
                [caption.text for caption in chunk],
                height=IMAGE_SIZE,
                width=IMAGE_SIZE,
                num_inference_steps=steps,
                guidance_scale=guidance,
                **own_arguments(pipeline),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="np",
            ).images
        )
        done = start + len(chunk)
        click.echo(
            f"{done}/{len(captions)} samples, {time.monotonic() - started:.0f} s", err=True
        )
    return np.concatenate(pictures)


def write_grid(file: Path, pictures: np.ndarray) -> None:
    """Tile the pictures in sampling order, row by row."""
    rows = -(-len(pictures) // GRID_COLUMNS)
    canvas = np.full((rows * IMAGE_SIZE, GRID_COLUMNS * IMAGE_SIZE, 3), 0.5)
    for index, picture in enumerate(pictures):
        row, column = (
            (index // GRID_COLUMNS) * IMAGE_SIZE,
            (index % GRID_COLUMNS) * IMAGE_SIZE,
        )
        canvas[row : row + IMAGE_SIZE, column : column + IMAGE_SIZE] = picture
    image = Image.fromarray((canvas * 255).round().astype(np.uint8))
    image.resize(
        (image.width * GRID_ZOOM, image.height * GRID_ZOOM), Image.Resampling.NEAREST
    ).save(file)


def report(captions: list[Caption], readings: list[Reading]) -> bool:
    """Print accuracies and the table per digit; true if every accuracy suffices."""
    expected = [(caption.digit, *expected_names(caption.colouring)) for caption in captions]
    found = [(reading.digit, reading.ink, reading.paper) for reading in readings]
    total = len(captions)
    accuracies = []
    for column, name in enumerate(("digit", "ink", "paper")):
        right = sum(
            want[column] == got[column] for want, got in zip(expected, found, strict=True)
        )
        accuracies.append(right / total)
        click.echo(f"{name} accuracy: {right}/{total} = {right / total:.1%}")
    right = sum(want == got for want, got in zip(expected, found, strict=True))
    click.echo(f"all three right: {right}/{total} = {right / total:.1%}")

    click.echo("\ndigit  right  samples  read instead")
    for digit in range(10):
        read = Counter(
            got[0] for want, got in zip(expected, found, strict=True) if want[0] == digit
        )
        wrong = ", ".join(
            f"{other} ({count})" for other, count in read.most_common() if other != digit
        )
        click.echo(f"{digit:>5}  {read[digit]:>5}  {read.total():>7}  {wrong}".rstrip())
    return min(accuracies) >= REQUIRED_ACCURACY


@click.command()
@click.argument(
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=EMBEDDED,
)
@click.option(
    "--samples",
    type=click.IntRange(1, 260),
    default=100,
    show_default=True,
    help="Number of samples.",
)
@click.option("--steps", default=28, show_default=True, help="Inference steps.")
@click.option("--guidance", default=4.5, show_default=True, help="Guidance scale.")
@click.option("--batch", default=10, show_default=True, help="Pictures per pipeline call.")
@click.option("--first-seed", default=0, show_default=True, help="Seed of the first picture.")
@click.option("--threads", default=2, show_default=True, help="CPU threads.")
@click.option(
    "--grid",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write all samples into this PNG.",
)
def main(
    folder: Path,
    samples: int,
    steps: int,
    guidance: float,
    batch: int,
    first_seed: int,
    threads: int,
    grid: Path | None,
) -> None:
    """Measure whether FOLDER (default: the embedded model) obeys its prompts."""
    torch.set_num_threads(threads)
    pipeline = load_finished(folder)
    captions = evenly_ordered_captions()[:samples]
    pictures = sample(pipeline, captions, steps, guidance, batch, first_seed)
    if grid:
        write_grid(grid, pictures)

    reader = DigitReader()
    passed = report(captions, reader.read(pictures))
    others = DigitReader(nearest_neighbours()).read(pictures)
    agreed = sum(
        caption.digit == reading.digit
        for caption, reading in zip(captions, others, strict=True)
    )
    click.echo(f"\ndigits read right by nearest neighbours instead: {agreed}/{samples}")
    psnr = reconstruction_psnr(pipeline.vae, digit_masks()[0])
    click.echo(f"autoencoder PSNR: {psnr:.1f} dB")
    click.echo(
        f"reader's cross-validated accuracy on real digits: {reader.accuracy_on_real_digits():.1%}"
    )
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
