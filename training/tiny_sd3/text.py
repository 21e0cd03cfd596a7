"""Tokenizer and text encoders in CLIP's style, their vocabulary learnt from the captions."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from training.tiny_longcat_image.data import all_captions

from .recipe import TextEncoderRecipe

END_OF_WORD = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(slots: int) -> CLIPTokenizer:
    """Byte-level BPE as CLIP's; every word of the captions becomes one token."""
    # Splitting and lower-casing are the tokenizer class's own: learn on what it will produce.
    untrained = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    bpe.normalizer, bpe.pre_tokenizer = untrained.normalizer, untrained.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        min_frequency=1,
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    bpe.train_from_iterator([caption.text for caption in all_captions()], trainer)
    learnt = json.loads(bpe.to_str())["model"]

    # Any text can be tokenized: every byte is in the vocabulary, within and at the end of a word.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + END_OF_WORD for letter in alphabet)]
    tokens += [token for token in learnt["vocab"] if token not in set(tokens)]
    tokens += [START, END]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge) for merge in learnt["merges"]],
        model_max_length=slots,
    )


def build_text_encoder(
    tokenizer: CLIPTokenizer, recipe: TextEncoderRecipe
) -> CLIPTextModelWithProjection:
    """An untrained text encoder of minimal size."""
    config = CLIPTextConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=recipe.hidden_size,
        intermediate_size=4 * recipe.hidden_size,
        projection_dim=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=recipe.slots,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)
