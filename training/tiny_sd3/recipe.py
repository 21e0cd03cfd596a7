"""Every size and training setting of the model in one place."""

from dataclasses import dataclass

from training.loop import LoopRecipe


@dataclass(frozen=True)
class TextEncoderRecipe:
    hidden_size: int = 64
    # The pipeline reads the last but one hidden state: the second layer serves the pooled projection alone.
    layers: int = 2
    heads: int = 2
    # Slots per prompt; the longest caption fills 13 of them.
    slots: int = 16


@dataclass(frozen=True)
class TransformerRecipe:
    blocks: int = 6
    heads: int = 5
    head_dim: int = 16
    patch_size: int = 2


LOOP = LoopRecipe(steps=6000, batch=64, learning_rate=2e-3)


@dataclass(frozen=True)
class Recipe:
    text_encoder: TextEncoderRecipe = TextEncoderRecipe()
    transformer: TransformerRecipe = TransformerRecipe()
    loop: LoopRecipe = LOOP
    side: int = 32  # of the pictures, in pixels; the autoencoder was trained on 32
    pictures: int | None = None  # of the 1,797 digits, the first; None: all
    device: str = "cpu"
