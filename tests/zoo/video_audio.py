"""Video models that can carry audio beside the video, and their video-only relatives."""

import torch

from .spec import Step, TinyModel, table
from .video_cross import LTX2


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


def _ltx2(step: Step) -> dict:
    return dict(
        _ltx(step),
        audio_hidden_states=step.latents(step.batch, 9, 4, salt=1),
        audio_encoder_hidden_states=step.fixed(step.batch, 16, 16, salt=2),
        audio_num_frames=9,
        fps=25.0,
    )


def _ltx2_tokens(step: Step) -> dict:
    """Image-to-video: a time per video token, 0 on the given frame; the audio has its own."""
    times = step.falling()[:, None].repeat(1, 32)
    times[:, :16] = 0
    return dict(
        _ltx2(step), timestep=times, audio_timestep=step.falling(), sigma=step.falling()
    )


def _kandinsky5(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 2, 8, 8, 4),
        encoder_hidden_states=step.fixed(step.batch, 8, 16, salt=1),
        timestep=step.falling(),
        pooled_projections=step.fixed(step.batch, 8, salt=2),
        visual_rope_pos=[torch.arange(2), torch.arange(4), torch.arange(4)],
        text_rope_pos=torch.arange(8),
    )


def _kandinsky6(step: Step) -> dict:
    """Noisy latents, given latents and their mask in the channels, which come last."""
    condition = step.fixed(step.batch, 2, 4, 4, 5, salt=3)
    return dict(
        hidden_states=torch.cat([step.latents(step.batch, 2, 4, 4, 4), condition], dim=-1),
        encoder_hidden_states=step.fixed(step.batch, 8, 16, salt=1),
        pooled_projections=step.fixed(step.batch, 8, salt=2),
        timestep=step.falling(),
    )


def _kandinsky6_audio(step: Step) -> dict:
    return dict(_kandinsky6(step), audio_hidden_states=step.latents(step.batch, 6, 4, salt=1))


def _kandinsky6_sr(step: Step) -> dict:
    condition = step.fixed(step.batch, 1, 8, 8, 5, salt=3)
    return dict(
        hidden_states=torch.cat([step.latents(step.batch, 1, 8, 8, 4), condition], dim=-1),
        timestep=step.falling(),
    )


def _minimax_h3(step: Step) -> dict:
    """Text, audio and video rows in one packed sequence; audio runs on a schedule of its own."""
    text, audio, video = 4, 6, 8
    rows = torch.arange(text + audio + video)
    positions = torch.zeros(len(rows), 3)
    positions[:, 0] = rows
    positions[text + audio :, 1] = torch.arange(video) // 2
    positions[text + audio :, 2] = torch.arange(video) % 2
    return dict(
        hidden_states=step.latents(step.batch, video, 16),
        audio_hidden_states=step.latents(step.batch, audio, 6, salt=1),
        encoder_hidden_states=step.fixed(step.batch, text, 8, salt=1),
        timestep=torch.tensor([1.0 - step.progress, (1.0 - step.progress) ** 2]),
        timestep_indices=((rows >= text) & (rows < text + audio)).long(),
        token_tags=torch.tensor([1] * text + [2] * audio + [0] * video),
        position_ids=positions,
        video_indices=rows[text + audio :],
        audio_indices=rows[text : text + audio],
        text_indices=rows[:text],
    )


def _cosmos3(step: Step) -> dict:
    text, side = 3, 4
    vision = torch.arange(text, text + side * side)
    return dict(
        input_ids=torch.arange(1, 1 + text),
        text_indexes=torch.arange(text),
        position_ids=torch.arange(text + side * side).expand(3, -1),
        und_len=text,
        sequence_length=text + side * side,
        vision_tokens=[step.latents(1, 2, 1, side, side)],
        vision_token_shapes=[(1, side, side)],
        vision_sequence_indexes=vision,
        vision_mse_loss_indexes=vision,
        vision_timesteps=torch.full((side * side,), 1000.0 * (1.0 - step.progress)),
        vision_noisy_frame_indexes=[torch.tensor([0])],
    )


def _cosmos3_sound(step: Step) -> dict:
    kwargs = _cosmos3(step)
    sound = torch.arange(19, 24)
    return dict(
        kwargs,
        position_ids=torch.arange(24).expand(3, -1),
        sequence_length=24,
        sound_tokens=[step.latents(3, 5, salt=1)],
        sound_token_shapes=[(5, 1, 1)],
        sound_sequence_indexes=sound,
        sound_mse_loss_indexes=sound,
        sound_timesteps=torch.full((5,), 1000.0 * (1.0 - step.progress)),
        sound_noisy_frame_indexes=[torch.arange(5)],
    )


_KANDINSKY6 = dict(
    in_visual_dim=4,
    out_visual_dim=4,
    in_text_dim=16,
    in_text_dim2=8,
    time_dim=16,
    model_dim=24,
    ff_dim=32,
    num_text_blocks=1,
    num_visual_blocks=3,
    axes_dims=(4, 4, 4),
    in_audio_dim=4,
    out_audio_dim=4,
    ca_rope=True,
    cross_gates=True,
    fix_modulation=True,
)
_COSMOS3 = dict(
    head_dim=6,
    hidden_act="relu2",
    hidden_size=12,
    intermediate_size=24,
    latent_channel=2,
    latent_patch_size=1,
    num_attention_heads=2,
    num_hidden_layers=3,
    num_key_value_heads=1,
    patch_latent_dim=2,
    qk_norm_for_text=False,
    rope_axes_dim=[1, 1, 1],
    vocab_size=32,
)
_VISUAL = ("visual_transformer_blocks",)
_LTX2_PIPELINES = "cache_context (3 contexts) in ltx2 and relatives; not in the ltx2_dfr pair"

MODELS = table(
    TinyModel(
        "ltx2",
        "LTX2VideoTransformer3DModel",
        LTX2,
        _ltx2,
        streams=2,
        pipelines=_LTX2_PIPELINES,
        remarks="a block takes and returns (video, audio)",
    ),
    TinyModel(
        "ltx2_tokens",
        "LTX2VideoTransformer3DModel",
        dict(
            LTX2,
            gated_attn=True,
            cross_attn_mod=True,
            audio_gated_attn=True,
            audio_cross_attn_mod=True,
        ),
        _ltx2_tokens,
        streams=2,
        pipelines=_LTX2_PIPELINES,
        remarks="timestep is (batch, tokens)",
    ),
    TinyModel(
        "kandinsky5",
        "Kandinsky5Transformer3DModel",
        dict(
            in_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=8,
            time_dim=16,
            out_visual_dim=4,
            model_dim=24,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=3,
            axes_dims=(4, 4, 4),
        ),
        _kandinsky5,
        _VISUAL,
        remarks="between stack and out_layer the tokens are folded back to (batch, frame, height, width, dim)",
    ),
    TinyModel(
        "kandinsky6",
        "Kandinsky6Transformer3DModel",
        _KANDINSKY6,
        _kandinsky6,
        _VISUAL,
        pipelines="cache_context",
        remarks="without audio the blocks return (video, None)",
    ),
    TinyModel(
        "kandinsky6_audio",
        "Kandinsky6Transformer3DModel",
        _KANDINSKY6,
        _kandinsky6_audio,
        _VISUAL,
        streams=2,
        pipelines="cache_context",
        remarks="a block takes and returns (video, audio) by position",
    ),
    TinyModel(
        "kandinsky6_sr",
        "Kandinsky6SRTransformer3DModel",
        dict(
            in_visual_dim=4,
            out_visual_dim=4,
            time_dim=16,
            model_dim=24,
            ff_dim=32,
            num_visual_blocks=3,
            axes_dims=(4, 4, 4),
            nabla_window=(3, 3, 3),
        ),
        _kandinsky6_sr,
        _VISUAL,
        remarks="sparse attention by flex_attention; no text",
    ),
    TinyModel(
        "minimax_h3",
        "MiniMaxH3Transformer3DModel",
        dict(
            num_attention_heads=2,
            attention_head_dim=16,
            hidden_size=24,
            num_layers=3,
            num_refiner_layers=1,
            ffn_dim=32,
            in_channels=4,
            audio_in_channels=6,
            text_dim=8,
            freq_dim=8,
            time_embed_hidden_dim=24,
            time_embed_dim=16,
            rope_freq_dim=2,
        ),
        _minimax_h3,
        pipelines="modular pipeline only",
        remarks="one packed sequence, video and audio are picked from it after norm_out; timestep: distinct times",
    ),
    TinyModel(
        "cosmos3",
        "Cosmos3OmniTransformer",
        _COSMOS3,
        _cosmos3,
        ("layers",),
        time="vision_timesteps",
        pipelines="cache_context",
        remarks="no batch dimension; blocks take and return (text, generated); after them the text is normed first",
    ),
    TinyModel(
        "cosmos3_sound",
        "Cosmos3OmniTransformer",
        dict(_COSMOS3, sound_gen=True, sound_dim=3),
        _cosmos3_sound,
        ("layers",),
        time="vision_timesteps",
        pipelines="cache_context",
        remarks="sound follows the video in the same stream; two lists come out",
    ),
)
