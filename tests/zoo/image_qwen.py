"""The Qwen-Image line and the mixture of experts built after it."""

import torch

from .spec import Step, TinyModel, table


def _qwen(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, 16, 16),
        encoder_hidden_states=step.fixed(step.batch, 8, 16, salt=1),
        encoder_hidden_states_mask=torch.ones(step.batch, 8, dtype=torch.long),
        timestep=step.falling(1.0),
        img_shapes=[[(1, 4, 4)]] * step.batch,
    )


def _qwen_edit(step: Step) -> dict:
    kwargs = _qwen(step)
    reference = step.fixed(step.batch, 16, 16, salt=2)
    return dict(
        kwargs,
        hidden_states=torch.cat([kwargs["hidden_states"], reference], dim=1),
        img_shapes=[[(1, 4, 4), (1, 4, 4)]] * step.batch,
    )


def _qwen_layered(step: Step) -> dict:
    kwargs = _qwen_edit(step)
    return dict(kwargs, additional_t_cond=torch.zeros(step.batch, dtype=torch.long))


def _qwen_controlnet(step: Step) -> dict:
    residuals = [0.3 * step.latents(step.batch, 16, 64, salt=10 + i) for i in range(3)]
    return dict(_qwen(step), controlnet_block_samples=residuals)


def _qwen21(step: Step) -> dict:
    """Text of five tokens; the target image is one slot per four latent tokens at the end of the text model's view."""
    return dict(
        hidden_states=step.latents(step.batch, 16, 8),
        encoder_hidden_states=step.fixed(step.batch, 5, 16, salt=1),
        encoder_hidden_states_mask=torch.ones(step.batch, 5, dtype=torch.bool),
        timestep=step.falling(1.0),
        img_shapes=[[(1, 4, 4)]] * step.batch,
        img_mask=torch.tensor([[False] * 5 + [True] * 4]).expand(step.batch, -1),
    )


def _qwen21_edit(step: Step) -> dict:
    """As above, with a reference image (one slot of the text tokens, four latent tokens) inside the text."""
    kwargs = _qwen21(step)
    reference = step.fixed(step.batch, 4, 8, salt=2)
    return dict(
        kwargs,
        hidden_states=torch.cat([reference, kwargs["hidden_states"]], dim=1),
        encoder_hidden_states=step.fixed(step.batch, 6, 16, salt=1),
        encoder_hidden_states_mask=torch.ones(step.batch, 6, dtype=torch.bool),
        img_shapes=[[(1, 2, 2), (1, 4, 4)]] * step.batch,
        img_mask=torch.tensor(
            [[False, False, True, False, False, False] + [True] * 4]
        ).expand(step.batch, -1),
    )


def _qwen21_kv(step: Step) -> dict:
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    return dict(
        _qwen21_edit(step),
        kv_cache=step.once("kv_cache", lambda: QwenImage21KVCache(3)),
        kv_cache_mode="cached" if step.index else "extract",
    )


def _nucleus(step: Step) -> dict:
    return dict(_qwen(step), img_shapes=[(1, 4, 4)] * step.batch)


_QWEN = dict(
    patch_size=2,
    in_channels=16,
    out_channels=4,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=4,
    joint_attention_dim=16,
    axes_dims_rope=(8, 4, 4),
)
_QWEN21 = dict(
    in_channels=8,
    out_channels=8,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    context_in_dim=16,
    axes_dims_rope=(4, 6, 6),
)
_NUCLEUS = dict(
    _QWEN,
    axes_dims_rope=(8, 4, 4),
    capacity_factors=2.0,
    num_experts=4,
    moe_intermediate_dim=16,
)
_QWEN_CLASS = "QwenImageTransformer2DModel"
_QWEN_PIPELINES = "cache_context in all 9"
_QWEN21_CLASS = "QwenImage21Transformer2DModel"

MODELS = table(
    TinyModel("qwen_image", _QWEN_CLASS, _QWEN, _qwen, pipelines=_QWEN_PIPELINES),
    TinyModel(
        "qwen_image_zero_cond_t",
        _QWEN_CLASS,
        dict(_QWEN, zero_cond_t=True),
        _qwen_edit,
        pipelines=_QWEN_PIPELINES,
        remarks="the batch of time embeddings is doubled (t and 0); reference tokens follow the noisy ones",
    ),
    TinyModel(
        "qwen_image_layered",
        _QWEN_CLASS,
        dict(_QWEN, use_additional_t_cond=True, use_layer3d_rope=True),
        _qwen_layered,
        pipelines=_QWEN_PIPELINES,
    ),
    TinyModel(
        "qwen_image_controlnet",
        _QWEN_CLASS,
        _QWEN,
        _qwen_controlnet,
        pipelines=_QWEN_PIPELINES,
        remarks="a residual is added after every block, also after the last one",
    ),
    TinyModel(
        "qwen_image21",
        _QWEN21_CLASS,
        _QWEN21,
        _qwen21,
        pipelines="cache_context",
        remarks="one sequence of text and image; the output keeps the text tokens, the pipeline cuts them off",
    ),
    TinyModel(
        "qwen_image21_edit", _QWEN21_CLASS, _QWEN21, _qwen21_edit, pipelines="cache_context"
    ),
    TinyModel(
        "qwen_image21_kv",
        _QWEN21_CLASS,
        _QWEN21,
        _qwen21_kv,
        pipelines="cache_context; the pipeline's default path",
        remarks="only the target image's tokens run after step 0: stream and output are shorter from step 1 on",
    ),
    TinyModel(
        "nucleus_image",
        "NucleusMoEImageTransformer2DModel",
        dict(_NUCLEUS, num_layers=5),
        _nucleus,
        remarks="the first three and the last block are dense, the one between is a mixture of experts",
    ),
)
