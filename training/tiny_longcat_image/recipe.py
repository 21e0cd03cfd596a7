"""Every size and training setting of the model in one place."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TextEncoderRecipe:
    hidden_size: int = 64
    layers: int = 2
    heads: int = 2
    steps: int = 400
    batch: int = 48
    learning_rate: float = 3e-3
    # Noise on the hidden states before the probes: captions have to lie far apart, not just be separable.
    probe_noise: float = 0.5


@dataclass(frozen=True)
class AutoencoderRecipe:
    channels: tuple[int, ...] = (16, 32, 32)
    steps: int = 1400
    batch: int = 32
    learning_rate: float = 3e-3
    l1_weight: float = 0.2
    kl_weight: float = 2e-4


@dataclass(frozen=True)
class TransformerRecipe:
    heads: int = 3
    head_dim: int = 32
    rope_axes: tuple[int, int, int] = (8, 12, 12)
    double_blocks: int = 2
    single_blocks: int = 4
    steps: int = 6000
    batch: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    final_learning_rate_fraction: float = 0.02
    ema_decay: float = 0.999
    # How often the caption is replaced by the empty one, which classifier-free guidance needs.
    empty_caption_rate: float = 0.12
    # Pad positions drawn per step to stand for all of them (see `denoiser.PadSampling`).
    sampled_pads: int = 4
    checkpoint_every: int = 250


@dataclass(frozen=True)
class Recipe:
    text_encoder: TextEncoderRecipe = TextEncoderRecipe()
    autoencoder: AutoencoderRecipe = AutoencoderRecipe()
    transformer: TransformerRecipe = TransformerRecipe()
