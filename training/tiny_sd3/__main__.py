"""Train `tiny-sd3` from nothing but the autoencoder of the embedded tiny-longcat-image.

    python -m training.tiny_sd3 --seed 0 --out FOLDER

Data and captions are those of tiny-longcat-image: scikit-learn's handwritten digits in 13 colourings; nothing is
downloaded. Transformer and text encoders are trained together.
Cost: 21 CPU minutes on one thread.
The folder has no T5: `DiffusionPipeline.from_pretrained` wants `text_encoder_3=None, tokenizer_3=None`.
Seed: every random number follows from it; rounding, and with it the last digits of the weights, depends on the
threads and the machine.

An interrupted run goes on where it was when the same command is given again. Its checkpoint lies in `FOLDER.work`,
which can be removed afterwards. Log lines go to stderr.
"""

import logging
from pathlib import Path

import click
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline

from training.folders import strip_local_origin

from .denoiser import build_scheduler, train_denoiser
from .recipe import Recipe
from .text import train_tokenizer

logger = logging.getLogger(__name__)

SHIPPED_DTYPE = torch.bfloat16
VAE_FOLDER = (
    Path(__file__).resolve().parents[2]
    / "calibrate"
    / "embedded"
    / "tiny-longcat-image"
    / "vae"
)


def train(out: Path, seed: int, recipe: Recipe) -> None:
    """Train what is not finished yet and write the pipeline folder."""
    work = out.with_name(out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(recipe.text_encoder.slots)
    vae = (
        AutoencoderKL.from_pretrained(VAE_FOLDER, dtype=torch.float32)
        .eval()
        .to(recipe.device)
    )
    with torch.device(recipe.device):
        model = train_denoiser(vae, tokenizer, recipe, seed, work / "transformer.pt")
    model.to(SHIPPED_DTYPE)
    pipeline = StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=build_scheduler(),
        vae=vae.to(SHIPPED_DTYPE),
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
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
    """Train tiny-sd3 on scikit-learn's handwritten digits."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(threads)
    train(out, seed, Recipe())
    logger.info("wrote %s", out)


if __name__ == "__main__":
    main()
