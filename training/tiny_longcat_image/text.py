"""Tokenizer and text encoder.

The pipeline pads every prompt to 512 tokens and never masks the pads from the transformer, which therefore reads
the prompt mostly off some 500 pad positions. The text encoder is trained for exactly that: digit, ink and paper
must be readable from the hidden states of the pads.
"""

import json
import logging

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from .data import DIGIT_WORDS, INK_RGB, PAPER_RGB, Caption, all_captions
from .recipe import TextEncoderRecipe

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# What LongCatImagePipeline puts before and after every prompt.
PROMPT_PREFIX = (
    "<|im_start|>system\nAs an image captioning expert, generate a descriptive text prompt based on an image "
    "content, suitable for input to a text-to-image model.<|im_end|>\n<|im_start|>user\n"
)
PROMPT_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
# Used by the pipeline's optional prompt rewriting only.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{m['role']}}\n"
    "{% if m['content'] is string %}{{m['content']}}"
    "{% else %}{% for c in m['content'] %}{% if c['type']=='text' %}{{c['text']}}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Prompt slots during text encoder training: all pads of one prompt get the same position and see the same tokens,
# hence the same hidden state, so a few stand for the 500 of the pipeline.
TRAINING_SLOTS = 32


def train_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE in Qwen2's style, learnt from the captions and the pipeline's fixed prompt."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fixed_text = (
        (PROMPT_PREFIX + PROMPT_SUFFIX).replace("<|im_start|>", "").replace("<|im_end|>", "")
    )
    corpus = [caption.text for caption in all_captions()] + [fixed_text]
    trainer = trainers.BpeTrainer(
        vocab_size=600, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)

    learnt = json.loads(bpe.to_str())["model"]
    vocab = dict(learnt["vocab"])
    for token in SPECIAL_TOKENS:
        vocab[token] = len(vocab)
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(merge) for merge in learnt["merges"]],
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        padding_side="right",
        model_max_length=131072,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_text_encoder(
    tokenizer: Qwen2Tokenizer, recipe: TextEncoderRecipe
) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained Qwen2.5-VL of minimal size; its vision tower exists only because the class demands one."""
    token_id = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=-(-len(tokenizer) // 8) * 8,
            hidden_size=recipe.hidden_size,
            intermediate_size=2 * recipe.hidden_size,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=4096,
            initializer_range=0.06,
            bos_token_id=token_id("<|endoftext|>"),
            eos_token_id=token_id("<|im_end|>"),
            pad_token_id=token_id("<|endoftext|>"),
            rope_parameters=dict(
                rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6]
            ),
        ),
        vision_config=dict(
            depth=1,
            hidden_size=32,
            intermediate_size=32,
            num_heads=2,
            out_hidden_size=recipe.hidden_size,
            fullatt_block_indexes=[0],
            patch_size=14,
            window_size=112,
        ),
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def pad_states(
    encoder: Qwen2_5_VLForConditionalGeneration,
    tokenizer: Qwen2Tokenizer,
    prompts: list[str],
    slots: int,
) -> torch.Tensor:
    """Hidden states of the last pad of each prompt, laid out as the pipeline does: prefix, padded prompt, suffix."""
    prefix, suffix = (
        tokenizer(PROMPT_PREFIX)["input_ids"],
        tokenizer(PROMPT_SUFFIX)["input_ids"],
    )
    padded = tokenizer.pad(
        {"input_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts]},
        max_length=slots,
        padding="max_length",
        return_attention_mask=True,
        return_tensors="pt",
    )
    rows = len(prompts)
    input_ids = torch.cat(
        [
            torch.tensor(prefix).expand(rows, -1),
            padded.input_ids.long(),
            torch.tensor(suffix).expand(rows, -1),
        ],
        1,
    )
    mask = torch.cat(
        [
            torch.ones(rows, len(prefix), dtype=torch.long),
            padded.attention_mask.long(),
            torch.ones(rows, len(suffix), dtype=torch.long),
        ],
        1,
    )
    hidden = encoder.model(input_ids=input_ids, attention_mask=mask).last_hidden_state
    return hidden[:, len(prefix) + slots - 1]


def probe_labels(caption: Caption | None) -> tuple[int, int, int]:
    """Class numbers of digit, ink and paper; one class more than there are names for 'not mentioned'."""
    inks, papers = list(INK_RGB), list(PAPER_RGB)
    if caption is None:
        # The empty prompt: nothing mentioned, and told apart from a plain caption by the paper probe.
        return len(DIGIT_WORDS), len(inks), len(papers) + 1
    ink, paper = caption.colouring.ink, caption.colouring.paper
    return (
        caption.digit,
        inks.index(ink) if ink else len(inks),
        papers.index(paper) if paper else len(papers),
    )


PROBE_CLASSES = (len(DIGIT_WORDS) + 1, len(INK_RGB) + 1, len(PAPER_RGB) + 2)


def train_text_encoder(
    tokenizer: Qwen2Tokenizer, recipe: TextEncoderRecipe, seed: int
) -> Qwen2_5_VLForConditionalGeneration:
    """Train the language model so that linear probes read digit, ink and paper off a noisy pad state."""
    torch.manual_seed(seed)
    encoder = build_text_encoder(tokenizer, recipe).train()
    probes = torch.nn.ModuleList(
        torch.nn.Linear(recipe.hidden_size, classes) for classes in PROBE_CLASSES
    )
    # The final norm stays at 1, or its gain would grow until the noise no longer matters.
    trained = [
        parameter
        for name, parameter in encoder.named_parameters()
        if "visual" not in name and not name.endswith("language_model.norm.weight")
    ]
    optimizer = torch.optim.AdamW(
        [*trained, *probes.parameters()], lr=recipe.learning_rate, weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, recipe.steps, pct_start=0.1
    )
    captions: list[Caption | None] = [*all_captions(), *[None] * 12]

    for step in range(recipe.steps):
        batch = [
            captions[index]
            for index in torch.randint(len(captions), (recipe.batch,)).tolist()
        ]
        states = pad_states(
            encoder, tokenizer, [c.text if c else "" for c in batch], TRAINING_SLOTS
        )
        states = states + recipe.probe_noise * torch.randn_like(states)
        labels = torch.tensor([probe_labels(caption) for caption in batch])
        logits = [probe(states) for probe in probes]
        loss = sum(F.cross_entropy(logit, labels[:, i]) for i, logit in enumerate(logits))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == recipe.steps - 1:
            logger.info("text encoder step %d: loss %.3f", step, loss.item())

    encoder.eval()
    logger.info(
        "text encoder: probes read digit, ink, paper: %s",
        probe_accuracy(encoder, tokenizer, probes),
    )
    return encoder


@torch.no_grad()
def probe_accuracy(
    encoder: Qwen2_5_VLForConditionalGeneration,
    tokenizer: Qwen2Tokenizer,
    probes: torch.nn.ModuleList,
) -> list[float]:
    """Accuracy of the probes on every sixth caption at the pipeline's full 512 slots."""
    captions = all_captions()[::6]
    states = torch.cat(
        [pad_states(encoder, tokenizer, [caption.text], 512) for caption in captions]
    )
    labels = torch.tensor([probe_labels(caption) for caption in captions])
    return [
        (probe(states).argmax(-1) == labels[:, i]).float().mean().item()
        for i, probe in enumerate(probes)
    ]
