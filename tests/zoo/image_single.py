"""Image models with one sequence of text and image from the first block on."""

import torch

from .spec import Step, TinyModel, table


def _lumina2(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 4, 8, 8),
        timestep=step.rising(),
        encoder_hidden_states=step.fixed(step.batch, 16, 32, salt=1),
        encoder_attention_mask=torch.ones(step.batch, 16, dtype=torch.bool),
    )


def _z_image(step: Step) -> dict:
    return dict(
        x=[step.latents(16, 1, 8, 8, salt=i) for i in range(step.batch)],
        cap_feats=[step.fixed(16, 16, salt=10 + i) for i in range(step.batch)],
        t=step.rising(),
    )


def _z_image_controlnet(step: Step) -> dict:
    """Sixteen image tokens are padded to 32, then come 32 of text: a residual spans both."""
    return dict(
        _z_image(step),
        controlnet_block_samples={0: 0.3 * step.latents(step.batch, 64, 16, salt=20)},
    )


def _z_image_omni(step: Step) -> dict:
    """Lists of images per sample: a reference (seen by an image encoder too), then the noisy target."""
    samples = range(step.batch)
    return dict(
        x=[
            [step.fixed(16, 1, 8, 8, salt=40 + i), step.latents(16, 1, 8, 8, salt=i)]
            for i in samples
        ],
        cap_feats=[
            [step.fixed(16, 16, salt=50 + i), step.fixed(16, 16, salt=60 + i)]
            for i in samples
        ],
        siglip_feats=[[step.fixed(4, 4, 12, salt=70 + i), None] for i in samples],
        image_noise_mask=[[0, 1]] * step.batch,
        t=step.rising(),
    )


def _omnigen(step: Step) -> dict:
    text, image = 8, 16
    length = text + 1 + image
    return dict(
        hidden_states=step.latents(step.batch, 4, 8, 8),
        timestep=step.rising(),
        input_ids=torch.arange(text).expand(step.batch, -1),
        input_img_latents=[],
        input_image_sizes={},
        attention_mask=torch.ones(step.batch, length, length),
        position_ids=torch.arange(length).expand(step.batch, -1),
    )


def _omnigen_edit(step: Step) -> dict:
    """Reference images replace placeholders of the text."""
    text, image = 24, 16
    length = text + 1 + image
    return dict(
        _omnigen(step),
        input_ids=torch.arange(text).expand(step.batch, -1),
        input_img_latents=[step.fixed(1, 4, 8, 8, salt=2 + i) for i in range(step.batch)],
        input_image_sizes={i: [[4, 4 + image]] for i in range(step.batch)},
        attention_mask=torch.ones(step.batch, length, length),
        position_ids=torch.arange(length).expand(step.batch, -1),
    )


def _ernie(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 16, 4, 4),
        timestep=step.falling(),
        text_bth=step.fixed(step.batch, 12, 16, salt=1),
        text_lens=torch.full((step.batch,), 12),
    )


def _ideogram4(step: Step) -> dict:
    """Both inputs span the whole sequence, each zero where the other one speaks."""
    from diffusers.models.transformers import transformer_ideogram4 as module

    text, side = 6, 4
    hidden_states = torch.zeros(step.batch, text + side * side, 8, dtype=step.dtype)
    hidden_states[:, text:] = step.latents(step.batch, side * side, 8)
    features = torch.zeros(step.batch, text + side * side, 16, dtype=step.dtype)
    features[:, :text] = step.fixed(step.batch, text, 16, salt=1)
    position_ids = torch.zeros(text + side * side, 3, dtype=torch.long)
    position_ids[:text] = torch.arange(text)[:, None]
    position_ids[text:] = 100
    position_ids[text:, 1] += torch.arange(side).repeat_interleave(side)
    position_ids[text:, 2] += torch.arange(side).repeat(side)
    indicator = torch.full((step.batch, text + side * side), module.OUTPUT_IMAGE_INDICATOR)
    indicator[:, :text] = module.LLM_TOKEN_INDICATOR
    return dict(
        hidden_states=hidden_states,
        timestep=step.rising().to(step.dtype),
        encoder_hidden_states=features,
        position_ids=position_ids.expand(step.batch, -1, -1),
        segment_ids=torch.ones(step.batch, text + side * side, dtype=torch.long),
        indicator=indicator,
    )


def _krea2(step: Step) -> dict:
    text, side = 6, 4
    position_ids = torch.zeros(text + side * side, 3)
    position_ids[text:, 1] = torch.arange(side).repeat_interleave(side)
    position_ids[text:, 2] = torch.arange(side).repeat(side)
    mask = torch.ones(step.batch, text, dtype=torch.bool)
    mask[:, -1] = False
    return dict(
        hidden_states=step.latents(step.batch, side * side, 4),
        encoder_hidden_states=step.fixed(step.batch, text, 3, 16, salt=1),
        timestep=step.falling(1.0),
        position_ids=position_ids,
        encoder_attention_mask=mask,
    )


def _fibo2(step: Step) -> dict:
    """Features for the perceiver, then one set per injection block."""
    return dict(
        hidden_states=step.latents(step.batch, 4, 8, 8),
        timestep=step.falling(1.0),
        encoder_hidden_states=step.fixed(step.batch, 2, 8, 16, salt=1),
    )


def _fibo2_edit(step: Step) -> dict:
    return dict(_fibo2(step), context_latents=[step.fixed(step.batch, 4, 4, 4, salt=2)])


_FIBO2 = dict(
    in_channels=4,
    dim=24,
    n_layers=3,
    n_refiner_layers=1,
    n_heads=2,
    cap_feat_dim=16,
    injection_layer_ids=(1,),
    perceiver_num_layers=1,
    min_num_gist_tokens=4,
    max_num_gist_tokens=8,
    gist_step=2,
    gist_min_text_len=4,
    gist_max_text_len=16,
    axes_dims=(4, 4, 4),
    axes_lens=(64, 32, 32),
)
_LAYERS = ("layers",)
_Z_IMAGE = dict(
    all_patch_size=(2,),
    all_f_patch_size=(1,),
    in_channels=16,
    dim=16,
    n_layers=3,
    n_refiner_layers=1,
    n_heads=1,
    n_kv_heads=2,
    cap_feat_dim=16,
    axes_dims=[8, 4, 4],
    axes_lens=[256, 32, 32],
)
_OMNIGEN = dict(
    hidden_size=16,
    num_attention_heads=4,
    num_key_value_heads=4,
    intermediate_size=32,
    num_layers=3,
    pad_token_id=0,
    vocab_size=64,
    in_channels=4,
    time_step_dim=4,
    pos_embed_max_size=16,
    rope_scaling={"long_factor": [1, 2], "short_factor": [1, 2]},
)
_Z_PIPELINES = (
    "no cache_context; guidance is batched and can be switched off late (batch 2 to 1)"
)

MODELS = table(
    TinyModel(
        "lumina2",
        "Lumina2Transformer2DModel",
        dict(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=3,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=2,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(128, 128, 128),
            cap_feat_dim=32,
        ),
        _lumina2,
        _LAYERS,
        rises=True,
        pipelines="no cache_context; cond and uncond are separate calls",
        remarks="the refiners run blocks of the same class before the stack; text is first in the sequence",
    ),
    TinyModel(
        "z_image",
        "ZImageTransformer2DModel",
        _Z_IMAGE,
        _z_image,
        _LAYERS,
        time="t",
        rises=True,
        pipelines=_Z_PIPELINES,
        remarks="lists of tensors in and out; image first, then text, both padded to multiples of 32 tokens",
    ),
    TinyModel(
        "z_image_controlnet",
        "ZImageTransformer2DModel",
        _Z_IMAGE,
        _z_image_controlnet,
        _LAYERS,
        time="t",
        rises=True,
        pipelines=_Z_PIPELINES,
    ),
    TinyModel(
        "z_image_omni",
        "ZImageTransformer2DModel",
        dict(_Z_IMAGE, siglip_feat_dim=12),
        _z_image_omni,
        _LAYERS,
        time="t",
        rises=True,
        pipelines=_Z_PIPELINES,
        remarks="text first here, then images; clean images, and the text in front of them, are modulated from time 1",
    ),
    TinyModel(
        "omnigen",
        "OmniGenTransformer2DModel",
        _OMNIGEN,
        _omnigen,
        _LAYERS,
        rises=True,
        remarks="time is a token of the sequence [text, time, image] and modulates the output only",
    ),
    TinyModel(
        "omnigen_edit",
        "OmniGenTransformer2DModel",
        _OMNIGEN,
        _omnigen_edit,
        _LAYERS,
        rises=True,
    ),
    TinyModel(
        "ernie_image",
        "ErnieImageTransformer2DModel",
        dict(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=3,
            ffn_hidden_size=32,
            in_channels=16,
            out_channels=16,
            text_in_dim=16,
            rope_axes_dim=(8, 4, 4),
        ),
        _ernie,
        _LAYERS,
        remarks="the stream is (tokens, batch, dim)",
    ),
    TinyModel(
        "ideogram4",
        "Ideogram4Transformer2DModel",
        dict(
            in_channels=8,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            intermediate_size=32,
            adaln_dim=16,
            llm_features_dim=16,
            rope_theta=10000,
            mrope_section=(2, 1, 1),
        ),
        _ideogram4,
        _LAYERS,
        rises=True,
        remarks="the output spans text positions too",
    ),
    TinyModel(
        "krea2",
        "Krea2Transformer2DModel",
        dict(
            in_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=32,
            timestep_embed_dim=8,
            text_hidden_dim=16,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=1,
            text_intermediate_size=16,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 2, 2),
        ),
        _krea2,
        pipelines="no cache_context",
        remarks="text passes blocks of its own before the stack",
    ),
    TinyModel(
        "bria_fibo2",
        "BriaFibo2Transformer2DModel",
        _FIBO2,
        _fibo2,
        _LAYERS,
        remarks="gist tokens first; the image is cut out after the stack; noise_refiner (same block class) runs first",
    ),
    TinyModel("bria_fibo2_edit", "BriaFibo2Transformer2DModel", _FIBO2, _fibo2_edit, _LAYERS),
)
