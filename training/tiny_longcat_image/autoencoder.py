"""The autoencoder: 32x32 RGB to 16 latent channels of 8x8 (LongCat-Image fixes the 16 channels)."""

import logging

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from .data import COLOURINGS, IMAGE_SIZE, digit_masks, paint
from .recipe import AutoencoderRecipe

logger = logging.getLogger(__name__)


def build_autoencoder(recipe: AutoencoderRecipe) -> AutoencoderKL:
    """An untrained AutoencoderKL with one resnet per level and no attention."""
    levels = len(recipe.channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        block_out_channels=recipe.channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def random_pictures(masks: torch.Tensor, count: int) -> torch.Tensor:
    """Draw digits, each in a colouring of its own."""
    digits = torch.randint(len(masks), (count,)).tolist()
    colourings = torch.randint(len(COLOURINGS), (count,)).tolist()
    return torch.cat(
        [
            paint(masks[d : d + 1], COLOURINGS[c])
            for d, c in zip(digits, colourings, strict=True)
        ]
    )


def train_autoencoder(recipe: AutoencoderRecipe, seed: int) -> AutoencoderKL:
    """Train on random coloured digits, then set shift and scale so that latents have mean 0 and deviation 1."""
    torch.manual_seed(seed)
    vae = build_autoencoder(recipe)
    masks, _ = digit_masks()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.learning_rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, recipe.steps, pct_start=0.05
    )

    for step in range(recipe.steps):
        pictures = random_pictures(masks, recipe.batch)
        posterior = vae.encode(pictures).latent_dist
        latents = posterior.sample()
        decoded = vae.decode(latents).sample
        kl = posterior.kl().mean() / latents[0].numel()
        mse = F.mse_loss(decoded, pictures)
        loss = mse + recipe.l1_weight * F.l1_loss(decoded, pictures) + recipe.kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == recipe.steps - 1:
            logger.info("autoencoder step %d: mse %.5f kl %.2f", step, mse.item(), kl.item())

    vae.eval()
    normalise_latents(vae, masks)
    logger.info("autoencoder: PSNR %.1f dB", reconstruction_psnr(vae, masks))
    return vae


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, masks: torch.Tensor) -> None:
    """Measure the latents' mean and deviation and write them into the config, where the pipeline looks."""
    latents = torch.cat(
        [vae.encode(paint(masks[:200], c)).latent_dist.mode() for c in COLOURINGS]
    )
    vae.register_to_config(
        scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean())
    )


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, masks: torch.Tensor, count: int = 200) -> float:
    """PSNR in dB of decoded against painted digits, over all colourings (the digits are training data)."""
    dtype = next(vae.parameters()).dtype
    errors = []
    for colouring in COLOURINGS:
        pictures = paint(masks[:count], colouring)
        decoded = (
            vae.decode(vae.encode(pictures.to(dtype)).latent_dist.mode())
            .sample.float()
            .clamp(-1, 1)
        )
        errors.append(F.mse_loss(decoded, pictures) / 4)  # pictures span -1..1
    return float(-10 * torch.log10(torch.stack(errors).mean()))
