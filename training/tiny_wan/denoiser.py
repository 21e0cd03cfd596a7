"""Transformer and text encoder, trained together as a flow-matching model on the latents of moving shapes."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from diffusers import WanTransformer3DModel as Transformer
from torch import nn
from transformers import T5TokenizerFast, UMT5EncoderModel

from training.loop import Training, draw_sigmas, drop_captions, run_training

from .autoencoder import encode_clips
from .data import Caption, all_captions, render
from .recipe import Recipe, TransformerRecipe
from .text import build_text_encoder


def build_scheduler() -> UniPCMultistepScheduler:
    """The scheduler settings of Wan 2.1 at its lower resolution."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        num_train_timesteps=1000,
    )


def build_transformer(
    recipe: TransformerRecipe, text_size: int, latent_channels: int
) -> Transformer:
    """An untrained transformer whose blocks start as identities and whose output starts at zero (as DiT does)."""
    transformer = Transformer(
        patch_size=recipe.patch_size,
        num_attention_heads=recipe.heads,
        attention_head_dim=recipe.head_dim,
        in_channels=latent_channels,
        out_channels=latent_channels,
        text_dim=text_size,
        ffn_dim=recipe.feed_forward,
        num_layers=recipe.blocks,
        rope_max_seq_len=64,
    )
    # Cross attention has no gate: its output is zeroed instead.
    linears = [transformer.proj_out, transformer.condition_embedder.time_proj]
    linears += [block.attn2.to_out[0] for block in transformer.blocks]
    tables = [
        transformer.scale_shift_table,
        *(block.scale_shift_table for block in transformer.blocks),
    ]
    for parameter in [*tables, *(p for linear in linears for p in linear.parameters())]:
        nn.init.zeros_(parameter)
    return transformer


class Denoiser(nn.Module):
    """Everything that is trained together."""

    def __init__(self, transformer: Transformer, text_encoder: UMT5EncoderModel) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Prompt states as `WanPipeline.encode_prompt` makes them: the states of pads are replaced by zeros."""
        input_ids, mask = tokens.unbind(-1)
        return self.text_encoder(input_ids, mask).last_hidden_state * mask[..., None]

    def forward(
        self, latents: torch.Tensor, sigma: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        return self.transformer(
            hidden_states=latents,
            timestep=sigma * 1000,
            encoder_hidden_states=self.encode(tokens),
            return_dict=False,
        )[0]


ENCODED_TOGETHER = 32  # clips: a call takes as long for a few as for one


@dataclass
class TrainingData:
    """Everything the loop draws from, computed once."""

    latents: torch.Tensor  # [caption, clip, channel, frame, row, column]
    tokens: torch.Tensor  # [caption, slot, id and mask]; the last row is the empty prompt


def tokenize(tokenizer: T5TokenizerFast, texts: list[str]) -> torch.Tensor:
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return torch.stack([tokens.input_ids, tokens.attention_mask], -1)


@torch.no_grad()
def prepare_data(
    vae: AutoencoderKLWan, tokenizer: T5TokenizerFast, recipe: Recipe
) -> TrainingData:
    """Render and encode clips of every caption and tokenize the captions as the pipeline does."""
    captions, clips = all_captions(), recipe.clips_per_caption
    together = max(1, ENCODED_TOGETHER // clips)
    latents = torch.cat(
        [
            encode_clips(vae, torch.cat([render(each, clips, recipe.side) for each in part]))
            for part in (
                captions[i : i + together] for i in range(0, len(captions), together)
            )
        ]
    ).unflatten(0, (len(captions), clips))
    tokens = tokenize(tokenizer, [*(caption.text for caption in captions), ""])
    return TrainingData(latents, tokens.to(recipe.device))


def flow_loss(
    model: Denoiser,
    clean: torch.Tensor,
    sigma: torch.Tensor,
    noise: torch.Tensor,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """Mean squared error of the predicted velocity, noise minus clean latents."""
    share = sigma[:, None, None, None, None]
    velocity = model((1 - share) * clean + share * noise, sigma, tokens)
    return F.mse_loss(velocity, noise - clean)


def random_batch_loss(model: Denoiser, data: TrainingData, recipe: Recipe) -> torch.Tensor:
    """The loss on random clips with their captions, some of them with the empty one."""
    captions, clips = data.latents.shape[:2]
    size = (recipe.loop.batch,)
    caption = torch.randint(captions, size)
    clean = data.latents[caption, torch.randint(clips, size)]
    shown = drop_captions(caption, captions, recipe.loop.empty_caption_rate)
    return flow_loss(
        model,
        clean,
        draw_sigmas(recipe.loop.batch),
        torch.randn_like(clean),
        data.tokens[shown],
    )


# Captions that differ in one word, to see which words are obeyed.
PROBES = {
    "right": Caption("circle", "red", "left", "white"),
    "wrong shape": Caption("square", "red", "left", "white"),
    "wrong colour": Caption("circle", "blue", "left", "white"),
    "wrong direction": Caption("circle", "red", "right", "white"),
    "wrong background": Caption("circle", "red", "left", "black"),
}


@torch.no_grad()
def caption_losses(
    model: Denoiser, data: TrainingData, sigma: float = 0.9
) -> dict[str, float]:
    """Loss of the clips of one caption at one noise level for the right caption, wrong ones and the empty one.

    The gaps say whether the words are obeyed long before the loss itself does.
    """
    captions = all_captions()
    clean = data.latents[captions.index(PROBES["right"])]
    generator = torch.Generator(clean.device).manual_seed(1)
    noise = torch.randn(clean.shape, generator=generator)
    rows = {name: captions.index(caption) for name, caption in PROBES.items()}
    rows["empty"] = len(captions)
    sigmas = torch.full((len(clean),), sigma)
    return {
        name: flow_loss(
            model, clean, sigmas, noise, data.tokens[row].expand(len(clean), -1, -1)
        ).item()
        for name, row in rows.items()
    }


def train_denoiser(
    vae: AutoencoderKLWan,
    tokenizer: T5TokenizerFast,
    recipe: Recipe,
    seed: int,
    checkpoint: Path,
) -> Denoiser:
    """Train to the end, going on from `checkpoint` where it exists; the averaged weights."""
    torch.manual_seed(seed)
    data = prepare_data(vae, tokenizer, recipe)
    text_encoder = build_text_encoder(tokenizer, recipe.text_encoder)
    transformer = build_transformer(
        recipe.transformer, recipe.text_encoder.hidden_size, vae.config.z_dim
    )
    training = Training(Denoiser(transformer, text_encoder).to(recipe.device), recipe.loop)
    run_training(
        training,
        lambda model: random_batch_loss(model, data, recipe),
        lambda average: caption_losses(average, data),
        checkpoint,
    )
    return training.average
