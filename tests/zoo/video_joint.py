"""Video models in which text and video meet in joint attention: HunyuanVideo, CogVideoX and relatives."""

import torch

from .spec import Step, TinyModel, table

_DUAL = ("transformer_blocks", "single_transformer_blocks")


def _hunyuan(step: Step, frames: int = 1) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 4, frames, 6, 6),
        timestep=step.falling(),
        encoder_hidden_states=step.fixed(step.batch, 12, 16, salt=1),
        encoder_attention_mask=torch.ones(step.batch, 12),
        pooled_projections=step.fixed(step.batch, 8, salt=2),
        guidance=torch.full((step.batch,), 6000.0),
    )


def _hunyuan_token_replace(step: Step) -> dict:
    return _hunyuan(step, frames=2)


def _hunyuan_latent_concat(step: Step) -> dict:
    kwargs = _hunyuan(step)
    del kwargs["guidance"]
    condition = step.fixed(step.batch, 5, 1, 6, 6, salt=3)
    return dict(kwargs, hidden_states=torch.cat([kwargs["hidden_states"], condition], dim=1))


def _framepack(step: Step) -> dict:
    """Clean and history latents come first in the sequence; the history is coarser the older it is."""
    return dict(
        hidden_states=step.latents(step.batch, 4, 2, 4, 4),
        timestep=step.falling(),
        encoder_hidden_states=step.fixed(step.batch, 12, 16, salt=1),
        encoder_attention_mask=torch.ones(step.batch, 12),
        pooled_projections=step.fixed(step.batch, 8, salt=2),
        image_embeds=step.fixed(step.batch, 6, 16, salt=3),
        guidance=torch.full((step.batch,), 6000.0),
        indices_latents=torch.arange(7, 9),
        latents_clean=step.fixed(step.batch, 4, 1, 4, 4, salt=4),
        indices_latents_clean=torch.tensor([6]),
        latents_history_2x=step.fixed(step.batch, 4, 2, 4, 4, salt=5),
        indices_latents_history_2x=torch.arange(4, 6),
        latents_history_4x=step.fixed(step.batch, 4, 4, 4, 4, salt=6),
        indices_latents_history_4x=torch.arange(0, 4),
    )


def _hunyuan15(step: Step, image: bool = False) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 4, 1, 4, 4),
        timestep=step.falling().to(step.dtype),
        encoder_hidden_states=step.fixed(step.batch, 6, 16, salt=1),
        encoder_attention_mask=torch.ones(step.batch, 6),
        encoder_hidden_states_2=step.fixed(step.batch, 4, 8, salt=2),
        encoder_attention_mask_2=torch.ones(step.batch, 4),
        image_embeds=image * step.fixed(step.batch, 3, 12, salt=3),
    )


def _hunyuan15_i2v(step: Step) -> dict:
    return _hunyuan15(step, image=True)


def _motif(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 9, 2, 4, 4),
        timestep=step.falling(),
        encoder_hidden_states=step.fixed(step.batch, 12, 16, salt=1),
        encoder_attention_mask=torch.ones(step.batch, 12),
        image_embeds=step.fixed(step.batch, 3, 4, salt=2),
    )


def _cogvideox(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 1, 4, 8, 8),
        encoder_hidden_states=step.fixed(step.batch, 8, 8, salt=1),
        timestep=step.falling(),
    )


def _cogvideox_rotary(step: Step) -> dict:
    angles = torch.arange(16)[:, None] * torch.tensor(
        [1.0, 0.5, 0.25, 0.125]
    ).repeat_interleave(2)
    return dict(_cogvideox(step), image_rotary_emb=(angles.cos(), angles.sin()))


def _consisid(step: Step) -> dict:
    return dict(
        _cogvideox(step),
        id_cond=step.fixed(step.batch, 2, salt=2),
        id_vit_hidden=[step.fixed(step.batch, 2, 2, salt=3)],
    )


def _easyanimate(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 4, 2, 8, 8),
        timestep=step.falling(),
        encoder_hidden_states=step.fixed(step.batch, 8, 16, salt=1),
    )


def _mochi(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 4, 2, 8, 8),
        encoder_hidden_states=step.fixed(step.batch, 16, 16, salt=1),
        timestep=step.rising(1000.0),
        encoder_attention_mask=torch.ones(step.batch, 16, dtype=torch.bool),
    )


_HUNYUAN = dict(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=10,
    num_layers=2,
    num_single_layers=2,
    num_refiner_layers=1,
    patch_size=1,
    patch_size_t=1,
    text_embed_dim=16,
    pooled_projection_dim=8,
    rope_axes_dim=(2, 4, 4),
)
_HUNYUAN15 = dict(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=3,
    num_refiner_layers=1,
    mlp_ratio=2.0,
    text_embed_dim=16,
    text_embed_2_dim=8,
    image_embed_dim=12,
    rope_axes_dim=(2, 2, 4),
    target_size=16,
    task_type="t2v",
)
_MOTIF = dict(
    in_channels=9,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    num_single_layers=2,
    mlp_ratio=2.0,
    patch_size=1,
    text_embed_dim=16,
    image_embed_dim=4,
    rope_axes_dim=(4, 4, 4),
)
_COGVIDEOX = dict(
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    out_channels=4,
    time_embed_dim=2,
    text_embed_dim=8,
    num_layers=3,
    sample_width=8,
    sample_height=8,
    sample_frames=8,
    patch_size=2,
    temporal_compression_ratio=4,
    max_text_seq_length=8,
)
_CONSISID = dict(
    _COGVIDEOX,
    num_layers=4,
    is_train_face=True,
    cross_attn_interval=2,
    cross_attn_dim_head=8,
    cross_attn_num_heads=2,
    LFE_id_dim=2,
    LFE_vit_dim=2,
    LFE_depth=5,
    LFE_dim_head=8,
    LFE_num_heads=2,
    LFE_num_id_token=1,
    LFE_num_querie=1,
    LFE_output_dim=10,
    LFE_ff_mult=1,
    LFE_num_scale=1,
)
_HUNYUAN_CLASS = "HunyuanVideoTransformer3DModel"
_HUNYUAN_PIPELINES = (
    "cache_context in hunyuan_video; not in image2video, skyreels_image2video, framepack"
)
_COGVIDEOX_PIPELINES = 'cache_context("cond_uncond") in all 4, guidance is batched'

MODELS = table(
    TinyModel(
        "hunyuan_video",
        _HUNYUAN_CLASS,
        _HUNYUAN,
        _hunyuan,
        _DUAL,
        pipelines=_HUNYUAN_PIPELINES,
    ),
    TinyModel(
        "hunyuan_video_token_replace",
        _HUNYUAN_CLASS,
        dict(_HUNYUAN, image_condition_type="token_replace"),
        _hunyuan_token_replace,
        _DUAL,
        pipelines=_HUNYUAN_PIPELINES,
        remarks="the first frame's tokens are modulated from time 0, by block classes of their own",
    ),
    TinyModel(
        "hunyuan_video_latent_concat",
        _HUNYUAN_CLASS,
        dict(
            _HUNYUAN,
            in_channels=9,
            image_condition_type="latent_concat",
            guidance_embeds=False,
        ),
        _hunyuan_latent_concat,
        _DUAL,
        pipelines=_HUNYUAN_PIPELINES,
    ),
    TinyModel(
        "hunyuan_video_framepack",
        "HunyuanVideoFramepackTransformer3DModel",
        dict(
            _HUNYUAN,
            patch_size=2,
            has_image_proj=True,
            image_proj_dim=16,
            has_clean_x_embedder=True,
        ),
        _framepack,
        _DUAL,
        remarks="history tokens first; they are cut off between the stack and norm_out",
    ),
    TinyModel(
        "hunyuan_video15",
        "HunyuanVideo15Transformer3DModel",
        _HUNYUAN15,
        _hunyuan15,
        pipelines="cache_context in both",
        remarks="all-zero image_embeds mean text-to-video",
    ),
    TinyModel(
        "hunyuan_video15_i2v",
        "HunyuanVideo15Transformer3DModel",
        dict(_HUNYUAN15, task_type="i2v"),
        _hunyuan15_i2v,
    ),
    TinyModel(
        "motif_video",
        "MotifVideoTransformer3DModel",
        dict(
            _MOTIF,
            enable_text_cross_attention_dual=True,
            enable_text_cross_attention_single=True,
        ),
        _motif,
        _DUAL,
        pipelines="cache_context in both",
    ),
    TinyModel(
        "motif_video_decoder",
        "MotifVideoTransformer3DModel",
        dict(_MOTIF, num_single_layers=4, num_decoder_layers=2),
        _motif,
        _DUAL,
        pipelines="cache_context in both",
        remarks=(
            "the last 2 single blocks are a decoder: their stream starts from the embedded latents again and the "
            "stream so far becomes their text, so what leaves block 1 of the list is not what enters block 2"
        ),
    ),
    TinyModel(
        "cogvideox",
        "CogVideoXTransformer3DModel",
        _COGVIDEOX,
        _cogvideox,
        pipelines=_COGVIDEOX_PIPELINES,
    ),
    TinyModel(
        "cogvideox_rotary",
        "CogVideoXTransformer3DModel",
        dict(_COGVIDEOX, use_rotary_positional_embeddings=True),
        _cogvideox_rotary,
        pipelines=_COGVIDEOX_PIPELINES,
    ),
    TinyModel(
        "consisid",
        "ConsisIDTransformer3DModel",
        _CONSISID,
        _consisid,
        remarks="a face cross-attention (perceiver_cross_attention) is added between the blocks, after 0 and 2",
    ),
    TinyModel(
        "easyanimate",
        "EasyAnimateTransformer3DModel",
        dict(
            attention_head_dim=16,
            num_attention_heads=2,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            num_layers=3,
            mmdit_layers=2,
            time_embed_dim=8,
            text_embed_dim=16,
        ),
        _easyanimate,
        remarks="the last block is not an MMDiT block; norm_final and norm_out follow the stack",
    ),
    TinyModel(
        "mochi",
        "MochiTransformer3DModel",
        dict(
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=3,
            pooled_projection_dim=16,
            in_channels=4,
            text_embed_dim=16,
            time_embed_dim=4,
            max_sequence_length=16,
        ),
        _mochi,
        rises=True,
        pipelines="cache_context, guidance is batched",
        remarks="the published scheduler inverts the sigmas, so the model's time rises; the last block drops the text",
    ),
)
