"""Video models that read the text through cross-attention (other than the Wan line)."""

import torch

from .spec import Step, TinyModel, table
from .stubs import stub_torchvision


def _ltx(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 32, 4),
        encoder_hidden_states=step.fixed(step.batch, 16, 16, salt=1),
        timestep=step.falling(),
        encoder_attention_mask=torch.ones(step.batch, 16, dtype=torch.bool),
        num_frames=2,
        height=4,
        width=4,
    )


def _cosmos(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 4, 1, 8, 8),
        timestep=step.falling(),
        encoder_hidden_states=step.fixed(step.batch, 12, 16, salt=1),
        fps=30,
        padding_mask=torch.zeros(1, 1, 8, 8, dtype=step.dtype),
    )


def _cosmos_frames(step: Step) -> dict:
    """Video-to-world of Cosmos 2: a time per latent frame, given frames marked in a mask."""
    times = step.falling(1.0)[:, None, None, None, None].repeat(1, 1, 2, 1, 1).to(step.dtype)
    times[:, :, 0] = 0.01
    mask = torch.zeros(step.batch, 1, 2, 8, 8, dtype=step.dtype)
    mask[:, :, 0] = 1
    return dict(
        _cosmos(step),
        hidden_states=step.latents(step.batch, 4, 2, 8, 8),
        timestep=times,
        condition_mask=mask,
        fps=16,
    )


def _cosmos_controlnet(step: Step) -> dict:
    residuals = [0.3 * step.latents(step.batch, 1, 4, 4, 24, salt=10 + i) for i in range(2)]
    return dict(
        _cosmos(step), block_controlnet_hidden_states=[r.flatten(1, 3) for r in residuals]
    )


def _latte(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 4, 2, 8, 8),
        timestep=step.falling(),
        encoder_hidden_states=step.fixed(step.batch, 8, 8, salt=1),
        enable_temporal_attentions=True,
    )


def _allegro(step: Step) -> dict:
    axes = [torch.arange(2), torch.arange(4), torch.arange(4)]
    grid = torch.cartesian_prod(*axes).T.reshape(3, 1, -1)
    angles = torch.arange(4)[:, None] * torch.tensor([[1.0, 0.5]])
    table_ = torch.cat([angles, angles], dim=-1)
    frequencies = (table_.cos(), table_.sin())
    return dict(
        hidden_states=step.latents(step.batch, 4, 2, 8, 8),
        encoder_hidden_states=step.fixed(step.batch, 8, 8, salt=1),
        timestep=step.falling(),
        attention_mask=torch.ones(step.batch, 2, 8, 8),
        encoder_attention_mask=torch.ones(step.batch, 8),
        image_rotary_emb=((frequencies,) * 3, tuple(grid)),
    )


def _sana_video(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 4, 2, 8, 8),
        encoder_hidden_states=step.fixed(step.batch, 8, 16, salt=1),
        timestep=step.falling(),
    )


def _sana_video_i2v(step: Step) -> dict:
    """Image-to-video: a time per token, 0 on the given frame."""
    times = step.falling()[:, None, None, None, None].repeat(1, 1, 2, 4, 4)
    times[:, :, 0] = 0
    return dict(_sana_video(step), timestep=times)


def _sana_video_controlnet(step: Step) -> dict:
    residuals = tuple(0.3 * step.latents(step.batch, 32, 24, salt=10 + i) for i in range(2))
    return dict(_sana_video(step), controlnet_block_samples=residuals)


def _sana_wm(step: Step) -> dict:
    """A time per latent frame, and one rigid transform per token (precomputed: the geometry has no bfloat16)."""
    times = step.falling()[:, None, None].repeat(1, 1, 3)
    times[:, :, 0] = 0
    shift = 0.5 * step.fixed(step.batch, 48, 3, salt=3)
    rays = torch.eye(4, dtype=step.dtype).repeat(step.batch, 48, 1, 1)
    inverse = rays.clone()
    rays[..., :3, 3], inverse[..., :3, 3] = shift, -shift
    return dict(
        hidden_states=step.latents(step.batch, 4, 3, 4, 4),
        timestep=times,
        encoder_hidden_states=step.fixed(step.batch, 1, 8, 16, salt=1),
        encoder_attention_mask=torch.ones(step.batch, 8, dtype=torch.long),
        camera_conditions=step.fixed(step.batch, 3, 20, salt=4),
        cam_pos_embeds={
            "absmap": step.fixed(step.batch, 3, 3, 4, 4, salt=5),
            "P": rays,
            "P_inv": inverse,
        },
        chunk_plucker=step.fixed(step.batch, 6, 3, 4, 4, salt=2),
    )


def _sana_wm_refiner(step: Step) -> dict:
    angles = step.fixed(step.batch, 16, 16, salt=2).float()
    return dict(
        hidden_states=step.latents(step.batch, 16, 4),
        encoder_hidden_states=step.fixed(step.batch, 8, 16, salt=1),
        timestep=step.falling()[:, None].expand(-1, 16),
        video_rotary_emb=(angles.cos(), angles.sin()),
        encoder_attention_mask=torch.ones(step.batch, 8),
    )


LTX = dict(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    cross_attention_dim=16,
    num_layers=3,
    caption_channels=16,
)
LTX2 = dict(
    LTX,
    audio_in_channels=4,
    audio_out_channels=4,
    audio_num_attention_heads=2,
    audio_attention_head_dim=4,
    audio_cross_attention_dim=8,
    rope_double_precision=False,
)
_COSMOS = dict(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=3,
    mlp_ratio=2,
    text_embed_dim=16,
    adaln_lora_dim=4,
    max_size=(4, 32, 32),
)
_SANA_VIDEO = dict(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=3,
    num_cross_attention_heads=2,
    cross_attention_head_dim=12,
    cross_attention_dim=24,
    caption_channels=16,
    sample_size=8,
    rope_max_seq_len=32,
)
_COSMOS_REMARK = (
    "torchvision is stubbed (nearest resize of the padding mask); "
    "extra_pos_emb is added inside every block"
)

MODELS = table(
    TinyModel(
        "ltx",
        "LTXVideoTransformer3DModel",
        LTX,
        _ltx,
        pipelines="cache_context, guidance is batched",
    ),
    TinyModel(
        "cosmos",
        "CosmosTransformer3DModel",
        _COSMOS,
        _cosmos,
        remarks=_COSMOS_REMARK,
        stub=stub_torchvision,
    ),
    TinyModel(
        "cosmos_frames",
        "CosmosTransformer3DModel",
        dict(_COSMOS, in_channels=5, extra_pos_embed_type=None),
        _cosmos_frames,
        remarks="timestep is (batch, 1, frames, 1, 1); torchvision is stubbed",
        stub=stub_torchvision,
    ),
    TinyModel(
        "cosmos_controlnet",
        "CosmosTransformer3DModel",
        dict(_COSMOS, controlnet_block_every_n=2),
        _cosmos_controlnet,
        remarks="residuals are an argument of blocks 0 and 2, added at their end; torchvision is stubbed",
        stub=stub_torchvision,
    ),
    TinyModel(
        "latte",
        "LatteTransformer3DModel",
        dict(
            sample_size=8,
            num_layers=3,
            patch_size=2,
            attention_head_dim=4,
            num_attention_heads=2,
            caption_channels=8,
            in_channels=4,
            cross_attention_dim=8,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            video_length=2,
        ),
        _latte,
        ("transformer_blocks", "temporal_transformer_blocks"),
        remarks="the lists take turns: tokens of one frame attend in the first, frames of one token in the second",
    ),
    TinyModel(
        "allegro",
        "AllegroTransformer3DModel",
        dict(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            cross_attention_dim=24,
            sample_width=8,
            sample_height=8,
            sample_frames=2,
            caption_channels=8,
        ),
        _allegro,
    ),
    TinyModel("sana_video", "SanaVideoTransformer3DModel", _SANA_VIDEO, _sana_video),
    TinyModel(
        "sana_video_i2v",
        "SanaVideoTransformer3DModel",
        _SANA_VIDEO,
        _sana_video_i2v,
        remarks="timestep is (batch, 1, frames, rows, columns) of tokens",
    ),
    TinyModel(
        "sana_video_controlnet",
        "SanaVideoTransformer3DModel",
        _SANA_VIDEO,
        _sana_video_controlnet,
    ),
    TinyModel(
        "sana_wm",
        "SanaWMTransformer3DModel",
        dict(
            in_channels=4,
            num_layers=4,
            hidden_size=32,
            num_attention_heads=2,
            linear_head_dim=16,
            softmax_every_n=2,
            chunk_plucker_channels=6,
            chunk_plucker_post_attn_blocks=4,
            caption_channels=16,
        ),
        _sana_wm,
        ("blocks",),
        remarks="recurrent and softmax attention take turns; all block arguments are positional",
    ),
    TinyModel(
        "sana_wm_refiner",
        "SanaWMLTX2RefinerTransformer3DModel",
        LTX2,
        _sana_wm_refiner,
        pipelines="the second stage of sana_wm; without cache_context",
        remarks="video only; without its key/value cache",
    ),
)
