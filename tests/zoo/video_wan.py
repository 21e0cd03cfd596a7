"""Wan and its descendants: one list of blocks, text (and image) through cross-attention."""

import torch

from .spec import Step, TinyModel, table
from .stubs import stub_mask_compiler

_BLOCKS = ("blocks",)
_INIT = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=16,
    ffn_dim=32,
    num_layers=3,
    rope_max_seq_len=32,
)


def _wan(step: Step) -> dict:
    """Two latent frames of 8 x 8: 32 tokens."""
    return dict(
        hidden_states=step.latents(step.batch, 4, 2, 8, 8),
        timestep=step.falling(),
        encoder_hidden_states=step.fixed(step.batch, 12, 16, salt=1),
    )


def _wan_i2v(step: Step) -> dict:
    condition = step.fixed(step.batch, 4, 2, 8, 8, salt=2)
    kwargs = _wan(step)
    return dict(
        kwargs,
        hidden_states=torch.cat([kwargs["hidden_states"], condition], dim=1),
        encoder_hidden_states_image=step.fixed(step.batch, 257, 16, salt=3),
    )


def _wan_ti2v(step: Step) -> dict:
    """A time per token: the first latent frame is given, so its time is 0."""
    times = step.falling()[:, None].repeat(1, 32)
    times[:, :16] = 0
    return dict(_wan(step), timestep=times)


def _vace(step: Step) -> dict:
    return dict(
        _wan(step),
        control_hidden_states=step.fixed(step.batch, 6, 2, 8, 8, salt=2),
        control_hidden_states_scale=torch.tensor([1.0, 0.5]),
    )


def _animate(step: Step) -> dict:
    """Noisy latents, reference latents and a mask in the channels; one frame more than the pose has."""
    condition = step.fixed(step.batch, 8, 3, 8, 8, salt=2)
    return dict(
        hidden_states=torch.cat([step.latents(step.batch, 4, 3, 8, 8), condition], dim=1),
        timestep=step.falling(),
        encoder_hidden_states=step.fixed(step.batch, 12, 16, salt=1),
        encoder_hidden_states_image=step.fixed(step.batch, 12, 16, salt=3),
        pose_hidden_states=step.fixed(step.batch, 4, 2, 8, 8, salt=4),
        face_pixel_values=step.fixed(step.batch, 3, 5, 16, 16, salt=5),
    )


def _animate_2(step: Step) -> dict:
    """Step 0 is the reference pass that fills the cache; the later ones denoise one frame more than it had."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    frames = 3 if step.index else 2
    latents = (
        step.latents(step.batch, 4, frames, 4, 4)
        if step.index
        else step.fixed(step.batch, 4, 2, 4, 4, salt=2)
    )
    condition = step.fixed(step.batch, 8, frames, 4, 4, salt=3)
    grid = torch.tensor([[2, 2, 2]]).expand(step.batch, -1)
    kwargs = dict(
        hidden_states=list(latents),
        timestep=step.falling(),
        encoder_hidden_states=[step.fixed(8, 16, salt=10 + i) for i in range(step.batch)],
        condition_latents=list(condition),
        kv_cache=step.once("kv_cache", lambda: WanAnimate2KVCache(3)),
        seq_len=frames * 4,
    )
    if step.index == 0:
        return dict(kwargs, kv_cache_mode="extract", offset_grid_sizes=grid)
    return dict(
        kwargs,
        kv_cache_mode="cached",
        reference_grid_sizes=grid,
        origin_len=5,
        origin_area=[32, 32],
    )


def _skyreels_df(step: Step) -> dict:
    """Diffusion forcing: a time per latent frame; the second one lags behind the first."""
    times = torch.stack(
        [step.falling(), torch.clamp(step.falling() + 200.0, max=999.0)], dim=1
    )
    return dict(_wan(step), timestep=times, enable_diffusion_forcing=True, fps=[1])


def _anyflow(step: Step) -> dict:
    """Frames before channels; a flow map, so it is also told the time it jumps to."""
    times = step.falling()[:, None].expand(-1, 2)
    return dict(
        hidden_states=step.latents(step.batch, 2, 4, 8, 8),
        timestep=times,
        r_timestep=times - 1000.0 / step.total,
        encoder_hidden_states=step.fixed(step.batch, 12, 16, salt=1),
    )


def _anyflow_far(step: Step) -> dict:
    """The second chunk of a video: the first one, a single frame, is a cache that no step changes."""
    cache = [
        {
            "compressed_cache": step.fixed(2, step.batch, 2, 0, 12, salt=10),
            "full_cache": step.fixed(2, step.batch, 2, 16, 12, salt=10 + i),
        }
        for i in range(3)
    ]
    return dict(
        _anyflow(step),
        chunk_partition=[1, 2],
        kv_cache=cache,
        kv_cache_flag={"num_cached_chunks": 1, "is_cache_step": False},
    )


def _helios(step: Step) -> dict:
    """The history frames are clean and come first in the sequence, coarse to fine."""

    def history(frames: int, salt: int) -> torch.Tensor:
        return step.fixed(step.batch, 4, frames, 8, 8, salt=salt)

    def indices(start: int, frames: int) -> torch.Tensor:
        return torch.arange(start, start + frames).expand(step.batch, -1)

    return dict(
        _wan(step),
        indices_hidden_states=indices(6, 2),
        indices_latents_history_short=indices(5, 1),
        indices_latents_history_mid=indices(4, 1),
        indices_latents_history_long=indices(0, 4),
        latents_history_short=history(1, 2),
        latents_history_mid=history(1, 3),
        latents_history_long=history(4, 4),
    )


_I2V = dict(_INIT, in_channels=8, image_dim=16, added_kv_proj_dim=24)
_ANIMATE = dict(
    _INIT,
    in_channels=12,
    latent_channels=4,
    num_layers=4,
    image_dim=16,
    motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
    motion_encoder_size=16,
    motion_style_dim=8,
    motion_dim=4,
    motion_encoder_dim=16,
    face_encoder_hidden_dim=16,
    face_encoder_num_heads=2,
    inject_face_latents_blocks=2,
)
_ANIMATE_2 = dict(
    text_len=8,
    in_dim=12,
    dim=24,
    ffn_dim=32,
    freq_dim=16,
    text_dim=16,
    out_dim=4,
    num_heads=2,
    num_layers=3,
    use_img_emb=False,
)
_SKYREELS = dict(_INIT, freq_dim=16)
_HELIOS = dict(
    {k: v for k, v in _INIT.items() if k != "rope_max_seq_len"}, rope_dim=(4, 4, 4)
)
_WAN_PIPELINES = "cache_context in wan, wan_i2v and lucy_edit; not in wan_video2video"

MODELS = table(
    TinyModel(
        "wan21", "WanTransformer3DModel", _INIT, _wan, _BLOCKS, pipelines=_WAN_PIPELINES
    ),
    TinyModel(
        "wan_one_block", "WanTransformer3DModel", dict(_INIT, num_layers=1), _wan, _BLOCKS
    ),
    TinyModel(
        "wan21_i2v",
        "WanTransformer3DModel",
        _I2V,
        _wan_i2v,
        _BLOCKS,
        pipelines=_WAN_PIPELINES,
    ),
    TinyModel(
        "wan22_ti2v",
        "WanTransformer3DModel",
        _INIT,
        _wan_ti2v,
        _BLOCKS,
        pipelines=_WAN_PIPELINES,
        remarks="timestep is (batch, tokens) and 0 on the given frame",
    ),
    TinyModel(
        "wan_vace",
        "WanVACETransformer3DModel",
        dict(_INIT, num_layers=4, vace_layers=[0, 2], vace_in_channels=6),
        _vace,
        _BLOCKS,
        pipelines="cache_context",
        remarks="vace_blocks run before the stack on the control stream; their hints are added after blocks 0 and 2",
    ),
    TinyModel(
        "wan_animate",
        "WanAnimateTransformer3DModel",
        _ANIMATE,
        _animate,
        _BLOCKS,
        pipelines="cache_context",
        remarks="face_adapter modules are called between the blocks (after 0 and 2) and read the stream",
    ),
    TinyModel(
        "wan_animate_2",
        "WanAnimate2Transformer3DModel",
        _ANIMATE_2,
        _animate_2,
        _BLOCKS,
        pipelines="modular pipeline only",
        remarks="step 0 stands for the reference pass; lists of tensors in and out, always float32 out",
        stub=stub_mask_compiler,
    ),
    TinyModel(
        "skyreels_v2",
        "SkyReelsV2Transformer3DModel",
        _SKYREELS,
        _wan,
        _BLOCKS,
        pipelines="cache_context in all 5",
    ),
    TinyModel(
        "skyreels_v2_df",
        "SkyReelsV2Transformer3DModel",
        dict(_SKYREELS, inject_sample_info=True),
        _skyreels_df,
        _BLOCKS,
        pipelines="cache_context in all 5",
        remarks="timestep is (batch, frames), the frames run out of step; one fps entry per video fails for batch > 1",
    ),
    TinyModel("chronoedit", "ChronoEditTransformer3DModel", _INIT, _wan, _BLOCKS),
    TinyModel("anyflow", "AnyFlowTransformer3DModel", _INIT, _anyflow, _BLOCKS),
    TinyModel(
        "anyflow_far",
        "AnyFlowFARTransformer3DModel",
        _INIT,
        _anyflow_far,
        _BLOCKS,
        remarks=(
            "one chunk after another; between two chunks the model is called at time 0 over all frames so far, which "
            "runs the blocks, fills the cache and returns no sample"
        ),
    ),
    TinyModel(
        "helios",
        "HeliosTransformer3DModel",
        _HELIOS,
        _helios,
        _BLOCKS,
        pipelines="cache_context",
        remarks="norm_out cuts the history tokens off, so the exit sees more tokens than the output has",
    ),
)
