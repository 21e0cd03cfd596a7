"""Every size and training setting of the model in one place."""

from dataclasses import dataclass

from training.loop import LoopRecipe


@dataclass(frozen=True)
class AutoencoderRecipe:
    patch_size: int = 2
    base_channels: int = 16
    # One level more than there are changes of size.
    channel_factors: tuple[int, ...] = (2, 2)
    halve_time: tuple[bool, ...] = (True,)
    latent_channels: int = 16
    steps: int = 1200
    # Steps of the decoder alone after that.
    refining_steps: int = 1500
    batch: int = 4
    learning_rate: float = 2e-3
    l1_weight: float = 0.2
    kl_weight: float = 2e-5
    first_log_variance: float = -5.0
    shape_weight: float = 8.0


@dataclass(frozen=True)
class TextEncoderRecipe:
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    # Slots per prompt; the longest caption fills 10 of them. The pipeline fills the rest with zeros that take part in
    # the attention, so calls have to ask for as many: `max_sequence_length=16`.
    slots: int = 16


@dataclass(frozen=True)
class TransformerRecipe:
    blocks: int = 6
    heads: int = 4
    head_dim: int = 24
    feed_forward: int = 384
    patch_size: tuple[int, int, int] = (1, 2, 2)


LOOP = LoopRecipe(steps=5000, restarts=(2600,), batch=32, learning_rate=2e-3)


@dataclass(frozen=True)
class Recipe:
    autoencoder: AutoencoderRecipe = AutoencoderRecipe()
    text_encoder: TextEncoderRecipe = TextEncoderRecipe()
    transformer: TransformerRecipe = TransformerRecipe()
    loop: LoopRecipe = LOOP
    # Clips per caption that the transformer sees, encoded once before its training.
    clips_per_caption: int = 32
    side: int = 32  # of the frames, in pixels
    device: str = "cpu"
