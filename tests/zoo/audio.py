"""Audio models, and the one that denoises molecules."""

import torch

from .spec import Step, TinyModel, table


def _ace_step(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 8, 8),
        timestep=step.falling(1.0).to(step.dtype),
        timestep_r=step.falling(1.0).to(step.dtype),
        encoder_hidden_states=step.fixed(step.batch, 10, 32, salt=1),
        context_latents=step.fixed(step.batch, 8, 16, salt=2),
    )


def _longcat_audio(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 16, 8),
        encoder_hidden_states=step.fixed(step.batch, 10, 16, salt=1),
        encoder_attention_mask=torch.ones(step.batch, 10, dtype=torch.bool),
        timestep=step.rising(),
        attention_mask=torch.ones(step.batch, 16, dtype=torch.bool),
        latent_cond=step.fixed(step.batch, 16, 8, salt=2),
    )


def _minimax_music3(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 8, 12),
        timestep=step.rising().to(step.dtype),
        encoder_hidden_states=step.fixed(step.batch, 12, 16, salt=1),
    )


def _stable_audio(step: Step) -> dict:
    angles = torch.arange(9.0)[:, None].expand(9, 2)
    return dict(
        hidden_states=step.latents(step.batch, 3, 8),
        timestep=step.falling(1.0).to(step.dtype),
        encoder_hidden_states=step.fixed(step.batch, 5, 4, salt=1),
        global_hidden_states=step.fixed(step.batch, 1, 8, salt=2),
        rotary_embedding=(angles.cos(), angles.sin()),
    )


def _stable_audio3(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 8, 16),
        timestep=step.falling(1.0),
        encoder_hidden_states=step.fixed(step.batch, 4, 16, salt=1),
        global_hidden_states=step.fixed(step.batch, 12, salt=2),
        encoder_attention_mask=torch.ones(step.batch, 4),
    )


def _stable_audio3_inpaint(step: Step) -> dict:
    return dict(_stable_audio3(step), local_add_cond=step.fixed(step.batch, 5, 16, salt=3))


def _t5_film(step: Step) -> dict:
    encoded = step.fixed(step.batch, 6, 16, salt=1)
    return dict(
        encodings_and_masks=[(encoded, torch.ones(step.batch, 6, dtype=torch.bool))],
        decoder_input_tokens=step.latents(step.batch, 8, 4),
        decoder_noise_time=step.falling(0.999),
    )


def _rfd4(step: Step) -> dict:
    """Backbone and local latents of twelve residues; both have a time."""
    mask = torch.ones(step.batch, 12, dtype=torch.bool)
    return dict(
        bb_ca=step.latents(step.batch, 12, 3).float(),
        local_latents=step.latents(step.batch, 12, 8, salt=1).float(),
        bb_ca_time=step.rising(),
        local_latents_time=step.rising(),
        padding_mask=mask,
        conditioning={"is_in_context_conditioning": ~mask, "supports_local_latent": mask},
    )


_STABLE_AUDIO3 = dict(
    io_channels=8,
    embed_dim=32,
    depth=3,
    num_heads=4,
    cond_token_dim=16,
    global_cond_dim=12,
    local_add_cond_dim=5,
    timestep_features_dim=16,
    ff_mult=2.0,
    num_memory_tokens=3,
)

MODELS = table(
    TinyModel(
        "ace_step",
        "AceStepTransformer1DModel",
        dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            in_channels=24,
            audio_acoustic_hidden_dim=8,
            rope_theta=10000.0,
            sliding_window=2,
        ),
        _ace_step,
        ("layers",),
        remarks="sliding-window and full attention take turns",
    ),
    TinyModel(
        "longcat_audio",
        "LongCatAudioDiTTransformer",
        dict(dit_dim=32, dit_depth=3, dit_heads=4, dit_text_dim=16, latent_dim=8),
        _longcat_audio,
        ("blocks",),
        rises=True,
        remarks="the stack's input is added once more after the last block (long skip)",
    ),
    TinyModel(
        "minimax_music3",
        "MiniMaxMusic3Transformer1DModel",
        dict(
            in_channels=8,
            condition_dim=16,
            num_layers=3,
            num_attention_heads=2,
            attention_head_dim=8,
            ff_inner_dim=32,
            rotary_dim=4,
            fourier_embedding_dim=8,
        ),
        _minimax_music3,
        rises=True,
        pipelines="modular pipeline only",
        remarks="time is one token in front of the sequence, cut off after the stack; blocks are not modulated",
    ),
    TinyModel(
        "stable_audio",
        "StableAudioDiTModel",
        dict(
            sample_size=8,
            in_channels=3,
            num_layers=3,
            attention_head_dim=4,
            num_attention_heads=4,
            num_key_value_attention_heads=2,
            out_channels=3,
            cross_attention_dim=8,
            time_proj_dim=8,
            global_states_input_dim=8,
            cross_attention_input_dim=4,
        ),
        _stable_audio,
        remarks="time is in one token in front of the sequence; blocks are not modulated",
    ),
    TinyModel(
        "stable_audio3",
        "StableAudio3DiTModel",
        _STABLE_AUDIO3,
        _stable_audio3,
        remarks="memory tokens in front of the sequence, cut off after the stack",
    ),
    TinyModel(
        "stable_audio3_inpaint",
        "StableAudio3DiTModel",
        _STABLE_AUDIO3,
        _stable_audio3_inpaint,
    ),
    TinyModel(
        "t5_film",
        "T5FilmDecoder",
        dict(
            input_dims=4,
            targets_length=8,
            d_model=16,
            num_layers=3,
            num_heads=2,
            d_kv=8,
            d_ff=32,
        ),
        _t5_film,
        ("decoders",),
        time="decoder_noise_time",
        remarks="blocks return a tuple; their attention is wrapped in layers that normalise first",
    ),
    TinyModel(
        "rfd4_proteina",
        "RFD4ProteinaTransformer",
        dict(
            nlayers=3,
            token_dim=16,
            nheads=2,
            dim_cond=16,
            pair_repr_dim=8,
            latent_dim=8,
            t_emb_dim=8,
            xt_pair_dist_dim=6,
            tri_mult_c=8,
            feats_seq=("xt_bb_ca", "xt_local_latents"),
            feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"),
            feats_pair_repr=("xt_bb_ca_pair_dists",),
        ),
        _rfd4,
        ("transformer_layers",),
        time="bb_ca_time",
        rises=True,
        remarks="a pair representation is updated between the blocks; recycle_depth > 1 runs the stack several times",
    ),
)
