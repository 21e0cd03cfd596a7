"""Train `tiny-longcat-image` from nothing: tokenizer, text encoder, autoencoder and transformer.

    python -m training.tiny_longcat_image --seed 0 --out FOLDER

Data: scikit-learn's `load_digits` (1,797 handwritten digits of 8x8 pixels, UCI), enlarged to 32x32 and painted in
13 colourings; nothing is downloaded.
Cost: 35 CPU minutes, half an hour on two cores: text encoder 1, autoencoder 6, transformer 28.
Seed: the embedded model was made with `--seed 0 --threads 2`, the defaults. Every random number follows from the
seed; rounding, and with it the last digits of the weights, depends on the threads and the machine.

An interrupted run goes on where it was when the same command is given again. Its intermediate files lie in
`FOLDER.work`, which can be removed afterwards. Log lines go to stderr.
"""

import logging
from pathlib import Path

import click
import torch
from diffusers import AutoencoderKL, LongCatImagePipeline
from diffusers import LongCatImageTransformer2DModel as Transformer
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from training.folders import strip_local_origin

from .autoencoder import train_autoencoder
from .denoiser import build_scheduler, prepare_data, train_denoiser
from .recipe import Recipe
from .text import train_text_encoder, train_tokenizer

logger = logging.getLogger(__name__)

SHIPPED_DTYPE = torch.bfloat16


def make_text_part(work: Path, recipe: Recipe, seed: int) -> None:
    """Tokenizer and text encoder, unless a previous run has finished them."""
    if (work / "text_encoder.done").exists():
        return
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(work / "tokenizer")
    encoder = train_text_encoder(tokenizer, recipe.text_encoder, seed)
    encoder.to(SHIPPED_DTYPE).save_pretrained(work / "text_encoder")
    (work / "text_encoder.done").touch()


def make_autoencoder(work: Path, recipe: Recipe, seed: int) -> None:
    """The autoencoder, unless a previous run has finished it."""
    if (work / "vae.done").exists():
        return
    train_autoencoder(recipe.autoencoder, seed).to(SHIPPED_DTYPE).save_pretrained(
        work / "vae"
    )
    (work / "vae.done").touch()


def load_pipeline(
    work: Path, transformer: Transformer | None, dtype: torch.dtype
) -> LongCatImagePipeline:
    """Put the parts together; the transformer's training reads the others through the pipeline's own methods."""
    tokenizer = Qwen2Tokenizer.from_pretrained(work / "tokenizer")
    return LongCatImagePipeline(
        scheduler=build_scheduler(),
        vae=AutoencoderKL.from_pretrained(work / "vae", dtype=dtype).eval(),
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(
            work / "text_encoder", dtype=dtype
        ).eval(),
        tokenizer=tokenizer,
        # Prompt rewriting, the processor's only use, works with the tokenizer's chat template. A real
        # Qwen2VLProcessor needs torchvision, and a missing component makes a plain from_pretrained fail.
        text_processor=tokenizer,
        transformer=transformer,
    )


def train(out: Path, seed: int, recipe: Recipe) -> None:
    """Train every part that is not finished yet and write the pipeline folder."""
    work = out.with_name(out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    make_text_part(work, recipe, seed)
    make_autoencoder(work, recipe, seed)
    # The parts are stored in bf16: the transformer is trained on what the shipped parts produce.
    data = prepare_data(load_pipeline(work, None, torch.float32))
    transformer = train_denoiser(data, recipe, seed, work / "transformer.pt").to(
        SHIPPED_DTYPE
    )
    load_pipeline(work, transformer, SHIPPED_DTYPE).save_pretrained(out)
    strip_local_origin(out)


@click.command()
@click.option("--seed", default=0, show_default=True, help="Seed of every random number.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder that receives the pipeline.",
)
@click.option("--threads", default=2, show_default=True, help="CPU threads.")
def main(seed: int, out: Path, threads: int) -> None:
    """Train tiny-longcat-image from nothing on scikit-learn's handwritten digits."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(threads)
    train(out, seed, Recipe())
    logger.info("wrote %s", out)


if __name__ == "__main__":
    main()
