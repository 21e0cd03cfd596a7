"""Every size and training setting of the model in one place."""

from dataclasses import dataclass

from training.loop import LoopRecipe


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
    # Pad positions drawn per step to stand for all of them (see `denoiser.PadSampling`).
    sampled_pads: int = 4


LOOP = LoopRecipe(steps=6000, batch=64, learning_rate=2e-3)


@dataclass(frozen=True)
class Recipe:
    text_encoder: TextEncoderRecipe = TextEncoderRecipe()
    autoencoder: AutoencoderRecipe = AutoencoderRecipe()
    transformer: TransformerRecipe = TransformerRecipe()
    loop: LoopRecipe = LOOP
