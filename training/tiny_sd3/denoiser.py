"""Transformer and both text encoders, trained together as a flow-matching model on the latents of coloured digits.

Without a T5 the pipeline appends `ABSENT_T5_SLOTS` zero states to every prompt. They carry no position, so they stay
equal to each other in every block: training feeds one of them and adds the logarithm of their number to its key's
score, which gives exactly the same result for about a ninth of the cost. The trained model itself is the plain class.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers import SD3Transformer2DModel as Transformer
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from torch import nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from training.loop import Training, draw_sigmas, drop_captions, run_training
from training.tiny_longcat_image.data import (
    COLOURINGS,
    PHRASINGS_PER_SUBJECT,
    all_captions,
    caption_index,
    digit_masks,
    paint,
)

from .recipe import Recipe, TransformerRecipe
from .text import build_text_encoder

# The pipeline's default `max_sequence_length`.
ABSENT_T5_SLOTS = 256


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler settings of Stable Diffusion 3."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def build_transformer(
    recipe: TransformerRecipe, text_size: int, vae: AutoencoderKL, side: int
) -> Transformer:
    """An untrained transformer whose blocks start as identities and whose output starts at zero (as DiT does)."""
    latent_size = side // 2 ** (len(vae.config.block_out_channels) - 1)
    transformer = Transformer(
        sample_size=latent_size,
        patch_size=recipe.patch_size,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_layers=recipe.blocks,
        attention_head_dim=recipe.head_dim,
        num_attention_heads=recipe.heads,
        joint_attention_dim=text_size,
        caption_projection_dim=recipe.heads * recipe.head_dim,
        pooled_projection_dim=text_size,
        pos_embed_max_size=latent_size // recipe.patch_size,
        qk_norm="rms_norm",
    )
    modulations = (AdaLayerNormZero, AdaLayerNormContinuous)
    zeroed = [
        module.linear for module in transformer.modules() if isinstance(module, modulations)
    ]
    for linear in [*zeroed, transformer.proj_out]:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


class Denoiser(nn.Module):
    """Everything that is trained together."""

    def __init__(
        self,
        transformer: Transformer,
        text_encoder: CLIPTextModelWithProjection,
        text_encoder_2: CLIPTextModelWithProjection,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2

    def encode(
        self, input_ids: torch.Tensor, absent_t5_slots: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt states and pooled projections as `StableDiffusion3Pipeline.encode_prompt` puts them together."""
        outputs = [
            encoder(input_ids, output_hidden_states=True)
            for encoder in (self.text_encoder, self.text_encoder_2)
        ]
        states = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        states = F.pad(
            states, (0, self.transformer.config.joint_attention_dim - states.shape[-1])
        )
        states = F.pad(states, (0, 0, 0, absent_t5_slots))
        return states, torch.cat([output.text_embeds for output in outputs], -1)

    def forward(
        self,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        input_ids: torch.Tensor,
        absent_t5_slots: int = 1,
    ) -> torch.Tensor:
        states, pooled = self.encode(input_ids, absent_t5_slots)
        return self.transformer(
            hidden_states=latents,
            timestep=sigma * 1000,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            return_dict=False,
        )[0]


class LastKeyCountsManyTimes:
    """The stock joint attention, except that the last key counts `times` times; used while training only."""

    def __init__(self, times: int) -> None:
        self.score = math.log(times)

    def __call__(
        self,
        attn,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask=None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, tokens = hidden_states.shape[:2]

        def joint(project, project_text, norm, norm_text) -> torch.Tensor:
            parts = [project(hidden_states), project_text(encoder_hidden_states)]
            parts = [
                part.view(rows, -1, attn.heads, part.shape[-1] // attn.heads).transpose(1, 2)
                for part in parts
            ]
            if norm is not None:
                parts = [norm(parts[0]), norm_text(parts[1])]
            return torch.cat(parts, 2)

        query = joint(attn.to_q, attn.add_q_proj, attn.norm_q, attn.norm_added_q)
        key = joint(attn.to_k, attn.add_k_proj, attn.norm_k, attn.norm_added_k)
        value = joint(attn.to_v, attn.add_v_proj, None, None)
        bias = query.new_zeros(1, 1, 1, key.shape[2])
        bias[..., -1] = self.score
        mixed = (
            F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
            .transpose(1, 2)
            .flatten(2)
        )
        image, text = mixed[:, :tokens], mixed[:, tokens:]
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def set_attention(transformer: Transformer, processor) -> None:
    for module in transformer.modules():
        if isinstance(module, JointTransformerBlock):
            module.attn.set_processor(processor)


def with_stock_attention(model: Denoiser) -> Denoiser:
    """A copy that attends with diffusers' own code."""
    model = copy.deepcopy(model)
    set_attention(model.transformer, JointAttnProcessor2_0())
    return model


@dataclass
class TrainingData:
    """Everything the loop draws from, computed once."""

    latents: torch.Tensor  # [colouring, digit picture, channel, row, column]
    labels: torch.Tensor  # [digit picture]
    input_ids: torch.Tensor  # [caption, slot]; the last row is the empty prompt


@torch.no_grad()
def prepare_data(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, recipe: Recipe
) -> TrainingData:
    """Encode every digit in every colouring and tokenize every caption as the pipeline does."""
    masks, labels = (part[: recipe.pictures] for part in digit_masks(recipe.side))
    latents = torch.stack(
        [encode_pictures(vae, paint(masks, colouring)) for colouring in COLOURINGS]
    )
    texts = [caption.text for caption in all_captions()] + [""]
    tokens = tokenizer(
        texts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return TrainingData(latents, labels, tokens.input_ids.to(recipe.device))


def encode_pictures(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures to normalised latents."""
    latents = torch.cat(
        [vae.encode(chunk).latent_dist.mode() for chunk in pictures.split(256)]
    )
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def flow_loss(
    model: Denoiser,
    clean: torch.Tensor,
    sigma: torch.Tensor,
    noise: torch.Tensor,
    input_ids: torch.Tensor,
    slots=1,
) -> torch.Tensor:
    """Mean squared error of the predicted velocity, noise minus clean latents."""
    share = sigma[:, None, None, None]
    velocity = model((1 - share) * clean + share * noise, sigma, input_ids, slots)
    return F.mse_loss(velocity, noise - clean)


def random_batch_loss(model: Denoiser, data: TrainingData, recipe: Recipe) -> torch.Tensor:
    """The loss on random digits in random colourings with one of their captions, some of them with the empty one."""
    size = (recipe.loop.batch,)
    colourings, pictures = data.latents.shape[:2]
    picture = torch.randint(pictures, size)
    colouring = torch.randint(colourings, size)
    phrasing = torch.randint(PHRASINGS_PER_SUBJECT, size)
    captions = caption_index(data.labels[picture], colouring, phrasing)
    captions = drop_captions(
        captions, len(data.input_ids) - 1, recipe.loop.empty_caption_rate
    )
    clean = data.latents[colouring, picture]
    return flow_loss(
        model,
        clean,
        draw_sigmas(recipe.loop.batch),
        torch.randn_like(clean),
        data.input_ids[captions],
    )


@torch.no_grad()
def caption_losses(
    model: Denoiser, data: TrainingData, sigma: float = 0.9, count: int = 64
) -> dict[str, float]:
    """Loss at one noise level for the right caption, one with a wrong digit and the empty one.

    The gap between the first two says whether the digit in the prompt is obeyed long before the loss itself does.
    Also gives the right caption's loss with every zero state and the stock attention, which must be the same.
    """
    generator = torch.Generator(data.latents.device).manual_seed(1)
    colourings, pictures = data.latents.shape[:2]
    picture = torch.randint(pictures, (count,), generator=generator)
    colouring = torch.randint(colourings, (count,), generator=generator)
    clean = data.latents[colouring, picture]
    noise = torch.randn(clean.shape, generator=generator)
    digit = data.labels[picture]
    phrasing = torch.zeros_like(digit)
    right = caption_index(digit, colouring, phrasing)
    wrong = caption_index((digit + 3) % 10, colouring, phrasing)
    empty = torch.full_like(digit, len(data.input_ids) - 1)
    sigmas = torch.full((count,), sigma)

    def loss(captions: torch.Tensor, model: Denoiser, slots: int = 1) -> float:
        return flow_loss(model, clean, sigmas, noise, data.input_ids[captions], slots).item()

    return {
        "right": loss(right, model),
        "wrong digit": loss(wrong, model),
        "empty": loss(empty, model),
        f"right, {ABSENT_T5_SLOTS} zero states": loss(
            right, with_stock_attention(model), ABSENT_T5_SLOTS
        ),
    }


def train_denoiser(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    recipe: Recipe,
    seed: int,
    checkpoint: Path,
) -> Denoiser:
    """Train to the end, going on from `checkpoint` where it exists; the averaged weights with the stock attention."""
    data = prepare_data(vae, tokenizer, recipe)
    torch.manual_seed(seed)
    encoders = [build_text_encoder(tokenizer, recipe.text_encoder) for _ in range(2)]
    text_size = sum(encoder.config.projection_dim for encoder in encoders)
    transformer = build_transformer(recipe.transformer, text_size, vae, recipe.side)
    model = Denoiser(transformer, *encoders).to(recipe.device)
    set_attention(model.transformer, LastKeyCountsManyTimes(ABSENT_T5_SLOTS))
    training = Training(model, recipe.loop)
    run_training(
        training,
        lambda model: random_batch_loss(model, data, recipe),
        lambda average: caption_losses(average, data),
        checkpoint,
    )
    return with_stock_attention(training.average)
