"""Image models in which text and image meet in joint attention (other than the FLUX and Qwen-Image lines)."""

import torch

from .spec import Step, TinyModel, table


def _sd3(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 4, 8, 8),
        encoder_hidden_states=step.fixed(step.batch, 12, 32, salt=1),
        pooled_projections=step.fixed(step.batch, 64, salt=2),
        timestep=step.falling(),
    )


def _sd3_controlnet(step: Step) -> dict:
    residuals = [0.3 * step.latents(step.batch, 64, 32, salt=10 + i) for i in range(3)]
    return dict(_sd3(step), block_controlnet_hidden_states=residuals)


def _sd3_skip_layers(step: Step) -> dict:
    return dict(_sd3(step), skip_layers=[1])


def _auraflow(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 4, 8, 8),
        encoder_hidden_states=step.fixed(step.batch, 16, 32, salt=1),
        timestep=step.falling(1.0),
    )


def _hidream(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 4, 16, 16),
        encoder_hidden_states_t5=step.fixed(step.batch, 8, 8, salt=1),
        encoder_hidden_states_llama3=step.fixed(2, step.batch, 8, 4, salt=2),
        pooled_embeds=step.fixed(step.batch, 8, salt=3),
        timesteps=step.falling(),
    )


def _hunyuan_image(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 4, 4, 4),
        timestep=step.falling().to(step.dtype),
        encoder_hidden_states=step.fixed(step.batch, 6, 32, salt=1),
        encoder_attention_mask=torch.ones(step.batch, 6),
        encoder_hidden_states_2=step.fixed(step.batch, 4, 32, salt=2),
        encoder_attention_mask_2=torch.ones(step.batch, 4),
    )


def _cogview(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 4, 8, 8),
        encoder_hidden_states=step.fixed(step.batch, 8, 8, salt=1),
        timestep=step.falling(),
        original_size=torch.tensor([[64, 64]]).repeat(step.batch, 1),
        target_size=torch.tensor([[64, 64]]).repeat(step.batch, 1),
        crop_coords=torch.tensor([[0, 0]]).repeat(step.batch, 1),
    )


def _glm(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 4, 8, 8),
        encoder_hidden_states=step.fixed(step.batch, 12, 32, salt=1),
        prior_token_id=torch.arange(16).expand(step.batch, -1),
        prior_token_drop=torch.zeros(step.batch, 16, dtype=torch.bool),
        timestep=step.falling(),
        target_size=torch.tensor([[8.0, 8.0]]).repeat(step.batch, 1),
        crop_coords=torch.tensor([[0.0, 0.0]]).repeat(step.batch, 1),
    )


def _joyimage(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 8, 1, 4, 4),
        encoder_hidden_states=step.fixed(step.batch, 12, 16, salt=1),
        timestep=step.falling(),
    )


def _joyimage_plus(step: Step) -> dict:
    """Target and reference arrive as patches, one after the other."""
    reference = step.fixed(step.batch, 4, 8, 1, 2, 2, salt=2)
    return dict(
        hidden_states=torch.cat([step.latents(step.batch, 4, 8, 1, 2, 2), reference], dim=1),
        encoder_hidden_states=step.fixed(step.batch, 12, 16, salt=1),
        encoder_hidden_states_mask=torch.ones(step.batch, 12),
        timestep=step.falling(),
        shape_list=[[(1, 2, 2), (1, 2, 2)]] * step.batch,
    )


_SD3 = dict(
    sample_size=8,
    patch_size=1,
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=4,
    caption_projection_dim=32,
    joint_attention_dim=32,
    pooled_projection_dim=64,
    pos_embed_max_size=16,
)
_COGVIEW = dict(
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    text_embed_dim=8,
    time_embed_dim=8,
    condition_dim=4,
)
_JOYIMAGE = dict(
    in_channels=8,
    hidden_size=32,
    num_attention_heads=2,
    text_dim=16,
    num_layers=3,
    rope_dim_list=[4, 6, 6],
)
_SD3_CLASS = "SD3Transformer2DModel"
_SD3_PIPELINES = (
    "no cache_context; guidance is batched, skip-layer guidance is a further call"
)
_DUAL = ("transformer_blocks", "single_transformer_blocks")

MODELS = table(
    TinyModel("sd3", _SD3_CLASS, _SD3, _sd3, pipelines=_SD3_PIPELINES),
    TinyModel(
        "sd35",
        _SD3_CLASS,
        dict(_SD3, dual_attention_layers=(0,), qk_norm="rms_norm"),
        _sd3,
        pipelines=_SD3_PIPELINES,
        remarks="the first block has a second attention over the image alone",
    ),
    TinyModel(
        "sd3_controlnet",
        _SD3_CLASS,
        _SD3,
        _sd3_controlnet,
        pipelines=_SD3_PIPELINES,
        remarks="residuals are added after every block but the last, which drops the text (returns None for it)",
    ),
    TinyModel(
        "sd3_skip_layers",
        _SD3_CLASS,
        _SD3,
        _sd3_skip_layers,
        idle=(1,),
        pipelines=_SD3_PIPELINES,
        remarks="the third call of skip-layer guidance: some blocks are not called at all",
    ),
    TinyModel(
        "auraflow",
        "AuraFlowTransformer2DModel",
        dict(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=32,
            pos_embed_max_size=64,
        ),
        _auraflow,
        ("joint_transformer_blocks", "single_transformer_blocks"),
    ),
    TinyModel(
        "hidream",
        "HiDreamImageTransformer2DModel",
        dict(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_channels=[8, 4],
            text_emb_dim=8,
            num_routed_experts=2,
            num_activated_experts=2,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(16, 16),
            llama_layers=(0, 1, 0, 1),
            force_inference_output=True,
        ),
        _hidream,
        ("double_stream_blocks", "single_stream_blocks"),
        time="timesteps",
        remarks="image tokens come first in the single blocks' sequence; a new text is joined before every block",
    ),
    TinyModel(
        "hunyuan_image",
        "HunyuanImageTransformer2DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            patch_size=(1, 1),
            text_embed_dim=32,
            text_embed_2_dim=32,
            rope_axes_dim=(4, 4),
        ),
        _hunyuan_image,
        _DUAL,
        pipelines="cache_context in both",
        remarks="the text refiner has blocks of its own",
    ),
    TinyModel(
        "cogview3_plus",
        "CogView3PlusTransformer2DModel",
        dict(_COGVIEW, pos_embed_max_size=8),
        _cogview,
    ),
    TinyModel(
        "cogview4",
        "CogView4Transformer2DModel",
        _COGVIEW,
        _cogview,
        pipelines="cache_context, not in cogview4_control",
    ),
    TinyModel(
        "glm_image",
        "GlmImageTransformer2DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=32,
            time_embed_dim=16,
            condition_dim=8,
            prior_vq_quantizer_codebook_size=64,
        ),
        _glm,
        remarks="editing calls the model once per reference image (time 0, empty text) before the first step",
    ),
    TinyModel(
        "joyimage_edit",
        "JoyImageEditTransformer3DModel",
        _JOYIMAGE,
        _joyimage,
        ("double_blocks",),
    ),
    TinyModel(
        "joyimage_edit_plus",
        "JoyImageEditPlusTransformer3DModel",
        _JOYIMAGE,
        _joyimage_plus,
        ("double_blocks",),
    ),
)
