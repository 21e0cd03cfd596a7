"""The autoencoder: clips of 9 frames of 32x32 to 5 latent frames of 8x8.

Its layout is that of Wan 2.2's: patches of pixels instead of convolutions at full size, which would be most of the
cost, and shortcuts around the changes of size, without which it takes long to encode more than the background.
"""

import logging

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

from .data import FRAME_SIZE, all_captions, random_clips, render
from .recipe import AutoencoderRecipe

logger = logging.getLogger(__name__)


def build_autoencoder(recipe: AutoencoderRecipe) -> AutoencoderKLWan:
    """An untrained AutoencoderKLWan with one resnet per level."""
    patch_values = 3 * recipe.patch_size**2
    vae = AutoencoderKLWan(
        base_dim=recipe.base_channels,
        z_dim=recipe.latent_channels,
        dim_mult=list(recipe.channel_factors),
        num_res_blocks=1,
        is_residual=True,
        patch_size=recipe.patch_size,
        in_channels=patch_values,
        out_channels=patch_values,
        temperal_downsample=list(recipe.halve_time),
        latents_mean=[0.0] * recipe.latent_channels,
        latents_std=[1.0] * recipe.latent_channels,
        scale_factor_temporal=2 ** sum(recipe.halve_time),
        scale_factor_spatial=recipe.patch_size * 2 ** (len(recipe.channel_factors) - 1),
    )
    # With a deviation of 1 the noise would drown the latents' first traces of the shape, and the KL term would then
    # keep them out for good.
    torch.nn.init.constant_(
        vae.quant_conv.bias[recipe.latent_channels :], recipe.first_log_variance
    )
    return vae


def shape_weight(clips: torch.Tensor, weight: float) -> torch.Tensor:
    """A higher weight where a clip differs from its corner, which always shows the background.

    Shapes cover a twentieth of the picture: unweighted, the background is all that is learnt for a long time.
    """
    return torch.where(
        (clips - clips[..., :1, :1]).abs().amax(1, keepdim=True) > 0.05, weight, 1.0
    )


def decode_unclamped(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """What `vae.decode` does except for its clamp, behind which pixels that overshoot get no gradient."""
    vae.clear_cache()
    latents = vae.post_quant_conv(latents)
    frames = []
    for index in range(latents.shape[2]):
        vae._conv_idx = [0]
        chunk = latents[:, :, index : index + 1]
        frames.append(
            vae.decoder(
                chunk,
                feat_cache=vae._feat_map,
                feat_idx=vae._conv_idx,
                first_chunk=index == 0,
            )
        )
    vae.clear_cache()
    return unpatchify(torch.cat(frames, 2), vae.config.patch_size)


def reconstruction_loss(
    decoded: torch.Tensor, clips: torch.Tensor, recipe: AutoencoderRecipe
) -> torch.Tensor:
    """Squared and absolute error, with most of the weight on the shapes."""
    error = decoded - clips
    return (
        shape_weight(clips, recipe.shape_weight)
        * (error.square() + recipe.l1_weight * error.abs())
    ).mean()


class Descent:
    """AdamW with a one-cycle schedule over a fixed number of steps."""

    def __init__(
        self, parameters: list[torch.nn.Parameter], learning_rate: float, steps: int
    ) -> None:
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, learning_rate, steps, pct_start=0.05
        )

    def step(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()


def train_autoencoder(
    recipe: AutoencoderRecipe, seed: int, side: int, device: str
) -> AutoencoderKLWan:
    """Train on random clips, then write the latents' means and deviations into the config."""
    torch.manual_seed(seed)
    vae = build_autoencoder(recipe).to(device)
    descent = Descent(list(vae.parameters()), recipe.learning_rate, recipe.steps)
    for step in range(recipe.steps):
        clips = random_clips(recipe.batch, side)
        posterior = vae.encode(clips).latent_dist
        latents = posterior.sample()
        decoded = decode_unclamped(vae, latents)
        kl = posterior.kl().mean() / latents[0].numel()
        descent.step(reconstruction_loss(decoded, clips, recipe) + recipe.kl_weight * kl)
        if step % 50 == 0 or step == recipe.steps - 1:
            logger.info(
                "autoencoder step %d: mse %.5f kl %.2f",
                step,
                F.mse_loss(decoded, clips).item(),
                kl.item(),
            )

    vae.eval()
    normalise_latents(vae, side)
    logger.info("autoencoder: PSNR %.1f dB", reconstruction_psnr(vae, side))
    return vae


def refine_decoder(
    vae: AutoencoderKLWan, recipe: AutoencoderRecipe, seed: int, side: int
) -> AutoencoderKLWan:
    """Train the decoder alone for longer, on the latents that the shipped encoder gives.

    The encoder stays as it is, and with it the latents: this can go on while the transformer is trained on them.
    """
    torch.manual_seed(seed)
    vae.requires_grad_(False).eval()
    trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    descent = Descent(trained, recipe.learning_rate, recipe.refining_steps)
    for step in range(recipe.refining_steps):
        clips = random_clips(recipe.batch, side)
        # A transformer's latents are never exact: a little noise keeps the decoder from relying on their last digits.
        latents = vae.encode(clips).latent_dist.sample()
        decoded = decode_unclamped(vae, latents)
        descent.step(reconstruction_loss(decoded, clips, recipe))
        if step % 50 == 0 or step == recipe.refining_steps - 1:
            logger.info("decoder step %d: mse %.5f", step, F.mse_loss(decoded, clips).item())
    logger.info("refined decoder: PSNR %.1f dB", reconstruction_psnr(vae, side))
    return vae


@torch.no_grad()
def normalise_latents(vae: AutoencoderKLWan, side: int) -> None:
    """Measure every channel's mean and deviation and write them into the config, where the pipeline looks."""
    clips = torch.cat([render(caption, 1, side) for caption in all_captions()])
    latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in clips.split(32)])
    mean, deviation = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """Clips to normalised latents."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    deviation = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return (vae.encode(clips).latent_dist.mode() - mean) / deviation


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKLWan, side: int = FRAME_SIZE) -> float:
    """PSNR in dB of decoded against rendered clips, over all captions."""
    dtype = next(vae.parameters()).dtype
    errors = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clips = torch.cat([render(caption, 1, side) for caption in all_captions()])
    for chunk in clips.split(32):
        decoded = vae.decode(vae.encode(chunk.to(dtype)).latent_dist.mode()).sample.float()
        errors.append(F.mse_loss(decoded, chunk) / 4)  # pixels span -1..1
    return float(-10 * torch.log10(torch.stack(errors).mean()))
