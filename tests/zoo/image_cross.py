"""Image models in which the image reads the text through cross-attention, and the class-conditional ones."""

import torch

from .spec import Step, TinyModel, table


def _pixart(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 4, 8, 8),
        encoder_hidden_states=step.fixed(step.batch, 8, 8, salt=1),
        timestep=step.falling(),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )


def _class_label(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 4, 8, 8),
        timestep=step.falling().long(),
        class_labels=torch.zeros(step.batch, dtype=torch.long),
    )


def _hunyuan_dit(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 4, 8, 8),
        timestep=step.falling().to(step.dtype),
        encoder_hidden_states=step.fixed(step.batch, 4, 8, salt=1),
        text_embedding_mask=torch.ones(step.batch, 4),
        encoder_hidden_states_t5=step.fixed(step.batch, 4, 8, salt=2),
        text_embedding_mask_t5=torch.ones(step.batch, 4),
        image_meta_size=torch.tensor([[1024.0, 1024.0, 16.0, 16.0, 0.0, 0.0]]).repeat(
            step.batch, 1
        ),
        style=torch.zeros(step.batch, dtype=torch.long),
        image_rotary_emb=[torch.ones(16, 8), torch.zeros(16, 8)],
    )


def _sana(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 4, 4, 4),
        encoder_hidden_states=step.fixed(step.batch, 8, 8, salt=1),
        timestep=step.falling(),
    )


def _sana_sprint(step: Step) -> dict:
    return dict(_sana(step), guidance=torch.full((step.batch,), 0.45))


def _sana_controlnet(step: Step) -> dict:
    residuals = tuple(0.3 * step.latents(step.batch, 16, 8, salt=10 + i) for i in range(2))
    return dict(_sana(step), controlnet_block_samples=residuals)


def _lumina_next(step: Step) -> dict:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return dict(
        hidden_states=step.latents(step.batch, 4, 8, 8),
        timestep=step.rising(),
        encoder_hidden_states=step.fixed(step.batch, 8, 32, salt=1),
        encoder_mask=torch.ones(step.batch, 8),
        image_rotary_emb=get_2d_rotary_pos_embed_lumina(8, 8, 8),
        cross_attention_kwargs={},
    )


def _prx(step: Step) -> dict:
    mask = torch.ones(step.batch, 8, dtype=torch.bool)
    mask[:, -1] = False
    return dict(
        hidden_states=step.latents(step.batch, 4, 8, 8),
        timestep=step.falling(1.0),
        encoder_hidden_states=step.fixed(step.batch, 8, 16, salt=1),
        attention_mask=mask,
    )


_PIXART = dict(
    sample_size=8,
    num_layers=3,
    patch_size=2,
    attention_head_dim=4,
    num_attention_heads=2,
    in_channels=4,
    out_channels=8,
    cross_attention_dim=8,
    use_additional_conditions=False,
)
_DIT = dict(
    num_attention_heads=2,
    attention_head_dim=4,
    in_channels=4,
    out_channels=8,
    num_layers=3,
    norm_num_groups=1,
    attention_bias=True,
    sample_size=8,
    patch_size=2,
    activation_fn="gelu-approximate",
    num_embeds_ada_norm=8,
    norm_type="ada_norm_zero",
    norm_elementwise_affine=False,
)
_SANA = dict(
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=4,
    num_attention_heads=2,
    num_cross_attention_heads=2,
    cross_attention_head_dim=4,
    cross_attention_dim=8,
    caption_channels=8,
    sample_size=4,
)
_DIT_REMARK = "blocks embed the time themselves; after the stack the model calls block 0's embedding once more"

MODELS = table(
    TinyModel(
        "pixart",
        "PixArtTransformer2DModel",
        _PIXART,
        _pixart,
        remarks="one time embedding for all blocks",
    ),
    TinyModel("dit", "DiTTransformer2DModel", _DIT, _class_label, remarks=_DIT_REMARK),
    TinyModel(
        "transformer_2d",
        "Transformer2DModel",
        _DIT,
        _class_label,
        remarks="DiT mode (patches). " + _DIT_REMARK,
    ),
    TinyModel(
        "hunyuan_dit",
        "HunyuanDiT2DModel",
        dict(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=6,
            attention_head_dim=8,
            num_attention_heads=2,
            hidden_size=16,
            cross_attention_dim=8,
            cross_attention_dim_t5=8,
            pooled_projection_dim=4,
            text_len=4,
            text_len_t5=4,
        ),
        _hunyuan_dit,
        ("blocks",),
        remarks="skips: the last third of the blocks also reads outputs of the first third",
    ),
    TinyModel("sana", "SanaTransformer2DModel", _SANA, _sana),
    TinyModel(
        "sana_sprint",
        "SanaTransformer2DModel",
        dict(_SANA, guidance_embeds=True, qk_norm="rms_norm_across_heads"),
        _sana_sprint,
    ),
    TinyModel(
        "sana_controlnet",
        "SanaTransformer2DModel",
        _SANA,
        _sana_controlnet,
        remarks="residuals are added after blocks 1 and 2, not after block 0",
    ),
    TinyModel(
        "lumina_next",
        "LuminaNextDiT2DModel",
        dict(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=3,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=16,
            learn_sigma=False,
            cross_attention_dim=32,
        ),
        _lumina_next,
        ("layers",),
        rises=True,
        remarks="text in cross-attention and in the time embedding; rotary embedding is complex",
    ),
    TinyModel(
        "prx",
        "PRXTransformer2DModel",
        dict(
            in_channels=4,
            context_in_dim=16,
            hidden_size=32,
            mlp_ratio=2.0,
            num_heads=2,
            depth=3,
            axes_dim=[8, 8],
        ),
        _prx,
        ("blocks",),
        remarks="text gives keys and values only",
    ),
)
