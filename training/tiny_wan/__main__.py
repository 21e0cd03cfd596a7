"""Train `tiny-wan` from nothing: autoencoder, then transformer and text encoder together.

    python -m training.tiny_wan --seed 0 --out FOLDER

Data: shapes in motion, rendered as they are needed; nothing is downloaded.
Cost: about 40 CPU minutes on one thread: autoencoder 6, its decoder alone 5, transformer and text encoder 28.
Reached with the defaults: background, direction and mostly the colour are obeyed, the shape is not. It is lost in the
autoencoder already, whose pictures of circles, squares and triangles look alike; colours drift over the frames.
Seed: every random number follows from it; rounding, and with it the last digits of the weights, depends on the
threads and the machine.

An interrupted run goes on where it was when the same command is given again. Its intermediate files lie in
`FOLDER.work`, which can be removed afterwards. Log lines go to stderr.
"""

import logging
from pathlib import Path

import click
import torch
from diffusers import AutoencoderKLWan, WanPipeline

from training.folders import strip_local_origin

from .autoencoder import refine_decoder, train_autoencoder
from .denoiser import build_scheduler, train_denoiser
from .recipe import Recipe
from .text import build_tokenizer

logger = logging.getLogger(__name__)

SHIPPED_DTYPE = torch.bfloat16


def load_autoencoder(folder: Path, device: str) -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(folder, dtype=torch.float32).eval().to(device)


def make_autoencoder(work: Path, recipe: Recipe, seed: int) -> None:
    """The autoencoder, unless a previous run has finished it."""
    if (work / "vae.done").exists():
        return
    with torch.device(recipe.device):
        vae = train_autoencoder(recipe.autoencoder, seed, recipe.side, recipe.device)
    vae.to(SHIPPED_DTYPE).save_pretrained(work / "vae")
    (work / "vae.done").touch()


def make_refined_decoder(work: Path, recipe: Recipe, seed: int) -> None:
    """The autoencoder with a better decoder, unless a previous run has finished it."""
    if (work / "refined.done").exists():
        return
    vae = load_autoencoder(work / "vae", recipe.device)
    with torch.device(recipe.device):
        refine_decoder(vae, recipe.autoencoder, seed, recipe.side)
    vae.to(SHIPPED_DTYPE).save_pretrained(work / "refined")
    (work / "refined.done").touch()


def train(out: Path, seed: int, recipe: Recipe) -> None:
    """Train every part that is not finished yet and write the pipeline folder."""
    work = out.with_name(out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    make_autoencoder(work, recipe, seed)
    tokenizer = build_tokenizer(recipe.text_encoder.slots)
    # The parts are stored in bf16: the transformer is trained on what the shipped encoder produces.
    vae = load_autoencoder(work / "vae", recipe.device)
    with torch.device(recipe.device):
        model = train_denoiser(vae, tokenizer, recipe, seed, work / "transformer.pt")
    make_refined_decoder(work, recipe, seed)
    model.to(SHIPPED_DTYPE)
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=model.text_encoder,
        vae=load_autoencoder(work / "refined", recipe.device).to(SHIPPED_DTYPE),
        scheduler=build_scheduler(),
        transformer=model.transformer,
    )
    pipeline.save_pretrained(out)
    strip_local_origin(out)


@click.command()
@click.option("--seed", default=0, show_default=True, help="Seed of every random number.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder that receives the pipeline.",
)
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
def main(seed: int, out: Path, threads: int) -> None:
    """Train tiny-wan on rendered shapes in motion."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(threads)
    train(out, seed, Recipe())
    logger.info("wrote %s", out)


if __name__ == "__main__":
    main()
