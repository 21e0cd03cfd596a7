"""The transformer: built, zero-initialised and trained as a flow-matching model on the latents of coloured digits.

The pipeline feeds 512 text tokens per call, of which some 500 are pads. Training on all of them would cost about ten
times as much, so training sees the leading slots and a few pads drawn at random, and a bias on the keys of the drawn
pads makes their softmax weight stand for all pads (`PadSampling`). The trained model itself is the plain class.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, LongCatImagePipeline
from diffusers import LongCatImageTransformer2DModel as Transformer
from diffusers.models.transformers import transformer_longcat_image as longcat
from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids

from training.loop import LoopRecipe, Training, draw_sigmas, drop_captions, run_training

from .data import (
    COLOURINGS,
    PHRASINGS_PER_SUBJECT,
    all_captions,
    caption_index,
    digit_masks,
    paint,
)
from .recipe import Recipe, TransformerRecipe

TEXT_SLOTS = 512
LATENT_CHANNELS = 16


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler settings of LongCat-Image."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def build_transformer(recipe: TransformerRecipe, text_size: int) -> Transformer:
    """An untrained transformer whose blocks start as identities and whose output starts at zero (as DiT does)."""
    transformer = Transformer(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=recipe.double_blocks,
        num_single_layers=recipe.single_blocks,
        attention_head_dim=recipe.head_dim,
        num_attention_heads=recipe.heads,
        joint_attention_dim=text_size,
        pooled_projection_dim=text_size,
        axes_dims_rope=list(recipe.rope_axes),
    )
    modulations = (
        longcat.AdaLayerNormZero,
        longcat.AdaLayerNormZeroSingle,
        longcat.AdaLayerNormContinuous,
    )
    zeroed = [
        module.linear for module in transformer.modules() if isinstance(module, modulations)
    ]
    for linear in [*zeroed, transformer.proj_out]:
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return transformer


@dataclass
class TrainingData:
    """Everything the loop draws from, computed once."""

    latents: torch.Tensor  # [colouring, digit picture, image token, 64]
    labels: torch.Tensor  # [digit picture]
    text_states: torch.Tensor  # [caption, 512, text size]; the last row is the empty prompt
    leading_slots: (
        int  # slots that differ from caption to caption; all later ones are always pads
    )


@torch.no_grad()
def prepare_data(pipeline: LongCatImagePipeline) -> TrainingData:
    """Encode every digit in every colouring and every caption with the pipeline's own code."""
    masks, labels = digit_masks()
    latents = torch.stack(
        [encode_pictures(pipeline.vae, paint(masks, c)) for c in COLOURINGS]
    )
    texts = [caption.text for caption in all_captions()] + [""]
    chunks = [texts[start : start + 20] for start in range(0, len(texts), 20)]
    text_states = torch.cat([pipeline.encode_prompt(chunk)[0] for chunk in chunks])
    leading_slots = 1 + max(len(pipeline.tokenizer(text)["input_ids"]) for text in texts)
    return TrainingData(latents, labels, text_states, leading_slots)


def encode_pictures(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures to normalised latents, packed into image tokens as the pipeline packs them."""
    latents = torch.cat(
        [vae.encode(chunk).latent_dist.mode() for chunk in pictures.split(256)]
    )
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    count, channels, height, width = latents.shape
    return LongCatImagePipeline._pack_latents(latents, count, channels, height, width)


class BiasedAttnProcessor(longcat.LongCatImageAttnProcessor):
    """The stock attention with a fixed additive bias on the keys; used while training only."""

    def __init__(self, key_bias: torch.Tensor) -> None:
        super().__init__()
        self.key_bias = key_bias

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        image_rotary_emb=None,
    ) -> torch.Tensor:
        return super().__call__(
            attn, hidden_states, encoder_hidden_states, self.key_bias, image_rotary_emb
        )


class PadSampling:
    """Replaces the pipeline's pads by a few that carry the softmax weight of all of them."""

    def __init__(self, leading_slots: int, sampled_pads: int, image_tokens: int) -> None:
        self.leading_slots = leading_slots
        self.sampled_pads = sampled_pads
        pads = TEXT_SLOTS - leading_slots
        self.key_bias = torch.zeros(1, 1, 1, leading_slots + sampled_pads + image_tokens)
        self.key_bias[..., leading_slots : leading_slots + sampled_pads] = math.log(
            pads / sampled_pads
        )

    def install(self, transformer: Transformer) -> None:
        set_attention(transformer, BiasedAttnProcessor(self.key_bias))

    def draw_slots(self) -> torch.Tensor:
        pads = (
            self.leading_slots
            + torch.randperm(TEXT_SLOTS - self.leading_slots)[: self.sampled_pads]
        )
        return torch.cat([torch.arange(self.leading_slots), pads.sort().values])


def set_attention(
    transformer: Transformer, processor: longcat.LongCatImageAttnProcessor
) -> None:
    for module in transformer.modules():
        if isinstance(module, longcat.LongCatImageAttention):
            module.set_processor(processor)


def position_ids(image_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Text and image positions as the pipeline numbers them."""
    side = math.isqrt(image_tokens)
    text = prepare_pos_ids(0, "text", num_token=TEXT_SLOTS)
    image = prepare_pos_ids(
        1, "image", start=(TEXT_SLOTS, TEXT_SLOTS), height=side, width=side
    )
    return text, image


@dataclass
class Batch:
    clean: torch.Tensor
    captions: torch.Tensor  # rows of TrainingData.text_states
    sigma: torch.Tensor
    noise: torch.Tensor


def draw_batch(data: TrainingData, recipe: LoopRecipe) -> Batch:
    """Random digits in random colourings with one of their captions, some of them with the empty one."""
    colourings, pictures = data.latents.shape[:2]
    size = (recipe.batch,)
    picture = torch.randint(pictures, size)
    colouring = torch.randint(colourings, size)
    phrasing = torch.randint(PHRASINGS_PER_SUBJECT, size)
    captions = caption_index(data.labels[picture], colouring, phrasing)
    captions = drop_captions(captions, len(data.text_states) - 1, recipe.empty_caption_rate)
    sigma = draw_sigmas(recipe.batch)
    clean = data.latents[colouring, picture]
    return Batch(clean, captions, sigma, torch.randn_like(clean))


def flow_loss(
    transformer: Transformer, data: TrainingData, batch: Batch, slots: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of the predicted velocity, noise minus clean latents."""
    text_ids, image_ids = position_ids(batch.clean.shape[1])
    sigma = batch.sigma[:, None, None]
    velocity = transformer(
        hidden_states=(1 - sigma) * batch.clean + sigma * batch.noise,
        timestep=batch.sigma,
        encoder_hidden_states=data.text_states[batch.captions[:, None], slots],
        txt_ids=text_ids[slots],
        img_ids=image_ids,
        return_dict=False,
    )[0]
    return F.mse_loss(velocity, batch.noise - batch.clean)


@torch.no_grad()
def caption_losses(
    model: Transformer,
    data: TrainingData,
    sampling: PadSampling,
    sigma: float = 0.9,
    count: int = 64,
) -> dict[str, float]:
    """Loss at one noise level for the right caption, one with a wrong digit and the empty one.

    The gap between the first two says whether the digit in the prompt is obeyed long before the loss itself does.
    Also gives the right caption's loss over all 512 text slots, which pad sampling only approximates.
    """
    generator = torch.Generator().manual_seed(1)
    colourings, pictures = data.latents.shape[:2]
    picture = torch.randint(pictures, (count,), generator=generator)
    colouring = torch.randint(colourings, (count,), generator=generator)
    clean = data.latents[colouring, picture]
    noise = torch.randn(clean.shape, generator=generator)
    digit = data.labels[picture]
    phrasing = torch.zeros_like(digit)
    right = caption_index(digit, colouring, phrasing)
    wrong = caption_index((digit + 3) % 10, colouring, phrasing)
    empty = torch.full_like(digit, len(data.text_states) - 1)
    leading = sampling.leading_slots
    spread_pads = torch.linspace(leading, TEXT_SLOTS - 1, sampling.sampled_pads).long()
    sampled = torch.cat([torch.arange(leading), spread_pads])

    def loss(captions: torch.Tensor, model: Transformer, slots: torch.Tensor) -> float:
        return flow_loss(
            model, data, Batch(clean, captions, torch.full((count,), sigma), noise), slots
        ).item()

    return {
        "right": loss(right, model, sampled),
        "wrong digit": loss(wrong, model, sampled),
        "empty": loss(empty, model, sampled),
        "right, 512 slots": loss(
            right, with_stock_attention(model), torch.arange(TEXT_SLOTS)
        ),
    }


def with_stock_attention(model: Transformer) -> Transformer:
    """A copy that attends with diffusers' own code."""
    model = copy.deepcopy(model)
    set_attention(model, longcat.LongCatImageAttnProcessor())
    return model


def train_denoiser(
    data: TrainingData, recipe: Recipe, seed: int, checkpoint: Path
) -> Transformer:
    """Train to the end, going on from `checkpoint` where it exists; the averaged weights with the stock attention."""
    torch.manual_seed(seed)
    sampling = PadSampling(
        data.leading_slots, recipe.transformer.sampled_pads, data.latents.shape[2]
    )
    model = build_transformer(recipe.transformer, data.text_states.shape[-1])
    sampling.install(model)
    training = Training(model, recipe.loop)
    run_training(
        training,
        lambda model: flow_loss(
            model, data, draw_batch(data, recipe.loop), sampling.draw_slots()
        ),
        lambda average: caption_losses(average, data, sampling),
        checkpoint,
    )
    return with_stock_attention(training.average)
