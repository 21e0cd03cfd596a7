"""Measure whether a `tiny-wan` folder obeys its prompts.

    python -m training.evaluate_tiny_wan FOLDER [--strip STRIP.png]

Samples captions that cover shapes, colours, directions and backgrounds evenly through the real pipeline and reads the
clips back with `training.tiny_wan.reading`. Results go to stdout, progress to stderr; the exit status is 1 if
colours, directions or backgrounds are right in less than 85 % of the samples.
"""

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
from training.tiny_wan.autoencoder import reconstruction_psnr
from training.tiny_wan.data import (
    FRAME_SIZE,
    FRAMES,
    Caption,
    evenly_ordered_captions,
    render,
)
from training.tiny_wan.reading import Reading, read_clip

REQUIRED_ACCURACY = 0.85
# What the pipeline's text slots were in training; with more of them zeros would take part in the attention.
TEXT_SLOTS = 16
STRIP_ZOOM = 2


def sample(
    pipeline: DiffusionPipeline,
    captions: list[Caption],
    steps: int,
    guidance: float,
    batch: int,
    first_seed: int,
) -> np.ndarray:
    """One clip per caption, [N, 9, 32, 32, 3] in 0..1; clip k has seed `first_seed` + k whatever the batch size."""
    clips = []
    started = time.monotonic()
    for start in range(0, len(captions), batch):
        chunk = captions[start : start + batch]
        seeds = range(first_seed + start, first_seed + start + len(chunk))
        clips.append(
            pipeline(
                [caption.text for caption in chunk],
                negative_prompt="",
                height=FRAME_SIZE,
                width=FRAME_SIZE,
                num_frames=FRAMES,
                num_inference_steps=steps,
                guidance_scale=guidance,
                max_sequence_length=TEXT_SLOTS,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="np",
            ).frames
        )
        done = start + len(chunk)
        click.echo(
            f"{done}/{len(captions)} samples, {time.monotonic() - started:.0f} s", err=True
        )
    return np.concatenate(clips)


def write_strip(file: Path, clips: np.ndarray) -> None:
    """One row per clip, its frames side by side."""
    canvas = clips.transpose(0, 2, 1, 3, 4).reshape(
        len(clips) * FRAME_SIZE, FRAMES * FRAME_SIZE, 3
    )
    image = Image.fromarray((canvas * 255).round().astype(np.uint8))
    image.resize(
        (image.width * STRIP_ZOOM, image.height * STRIP_ZOOM), Image.Resampling.NEAREST
    ).save(file)


def accuracies(captions: list[Caption], readings: list[Reading]) -> dict[str, float]:
    """The share of clips in which each attribute is right, and all of them at once."""
    pairs = list(zip(captions, readings, strict=True))
    names = ("shape", "colour", "direction", "background")
    right = {
        name: [getattr(want, name) == getattr(got, name) for want, got in pairs]
        for name in names
    }
    result = {name: sum(flags) / len(pairs) for name, flags in right.items()}
    result["all four"] = sum(all(flags) for flags in zip(*right.values(), strict=True)) / len(
        pairs
    )
    return result


def reader_accuracies(captions: list[Caption]) -> dict[str, float]:
    """What the reader reads off rendered clips: what a perfect model could at most expect to score."""
    torch.manual_seed(0)
    clips = [
        (render(caption, 1)[0] / 2 + 0.5).permute(1, 2, 3, 0).numpy() for caption in captions
    ]
    return accuracies(captions, [read_clip(clip) for clip in clips])


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--samples",
    type=click.IntRange(1, 288),
    default=96,
    show_default=True,
    help="Number of samples.",
)
@click.option("--steps", default=30, show_default=True, help="Inference steps.")
@click.option("--guidance", default=4.5, show_default=True, help="Guidance scale.")
@click.option("--batch", default=12, show_default=True, help="Clips per pipeline call.")
@click.option("--first-seed", default=0, show_default=True, help="Seed of the first clip.")
@click.option("--threads", default=2, show_default=True, help="CPU threads.")
@click.option(
    "--strip",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the first 24 clips into this PNG.",
)
def main(
    folder: Path,
    samples: int,
    steps: int,
    guidance: float,
    batch: int,
    first_seed: int,
    threads: int,
    strip: Path | None,
) -> None:
    """Measure whether FOLDER obeys its prompts."""
    torch.set_num_threads(threads)
    pipeline = load_finished(folder)
    captions = evenly_ordered_captions()[:samples]
    clips = sample(pipeline, captions, steps, guidance, batch, first_seed)
    if strip:
        write_strip(strip, clips[:24])

    readings = [read_clip(clip) for clip in clips]
    reached = accuracies(captions, readings)
    for name, value in reached.items():
        click.echo(f"{name} right: {round(value * samples)}/{samples} = {value:.1%}")
    pairs = zip(captions, readings, strict=True)
    confused = Counter(
        (want.direction, got.direction)
        for want, got in pairs
        if want.direction != got.direction
    )
    for (want, got), count in confused.most_common():
        click.echo(f"direction {want!r} read as {got!r}: {count}")
    click.echo(f"autoencoder PSNR: {reconstruction_psnr(pipeline.vae):.1f} dB")
    on_rendered = ", ".join(
        f"{name} {value:.1%}" for name, value in reader_accuracies(captions).items()
    )
    click.echo(f"reader on rendered clips: {on_rendered}")
    sys.exit(
        0
        if min(reached[name] for name in ("colour", "direction", "background"))
        >= REQUIRED_ACCURACY
        else 1
    )


if __name__ == "__main__":
    main()
