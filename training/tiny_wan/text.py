"""Tokenizer and text encoder in UMT5's style, their vocabulary taken from the captions."""

import string

from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

from .data import all_captions
from .recipe import TextEncoderRecipe

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
WORD_START = "▁"
WORD_SCORE, LETTER_SCORE = -2.0, -10.0


def build_tokenizer(slots: int) -> T5TokenizerFast:
    """A Unigram tokenizer with one token per caption word; other words fall into letters."""
    words = sorted({word for caption in all_captions() for word in caption.text.split()})
    letters = [WORD_START, *string.ascii_letters, *string.digits, *string.punctuation]
    vocab = [(token, 0.0) for token in SPECIAL_TOKENS]
    vocab += [(WORD_START + word, WORD_SCORE) for word in words]
    vocab += [(letter, LETTER_SCORE) for letter in letters]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=slots)


def build_text_encoder(
    tokenizer: T5TokenizerFast, recipe: TextEncoderRecipe
) -> UMT5EncoderModel:
    """An untrained text encoder of minimal size."""
    config = UMT5Config(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        d_model=recipe.hidden_size,
        d_kv=recipe.hidden_size // recipe.heads,
        d_ff=2 * recipe.hidden_size,
        num_layers=recipe.layers,
        num_heads=recipe.heads,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return UMT5EncoderModel(config)
