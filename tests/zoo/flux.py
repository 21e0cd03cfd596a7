"""The FLUX line: a list of two-stream blocks, then a list of single-stream blocks over text and image."""

import torch
from torch import nn

from .spec import Step, TinyModel, table

SIDE = 4
TOKENS = SIDE * SIDE
TEXT = 12
DIM = 32

_DUAL = ("transformer_blocks", "single_transformer_blocks")
_INIT = dict(
    patch_size=1,
    in_channels=4,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=DIM,
)
_ROPE = dict(axes_dims_rope=(4, 4, 8))


def _grid(plane: int, axes: int) -> torch.Tensor:
    """Position ids (plane, row, column, ...) of the image tokens."""
    ids = torch.zeros(SIDE, SIDE, axes)
    ids[..., 0] = plane
    ids[..., 1] += torch.arange(SIDE)[:, None]
    ids[..., 2] += torch.arange(SIDE)[None, :]
    return ids.reshape(TOKENS, axes)


def _text_ids(axes: int) -> torch.Tensor:
    ids = torch.zeros(TEXT, axes)
    if axes == 4:
        ids[:, 3] = torch.arange(TEXT)
    return ids


def _base(step: Step) -> dict:
    return dict(
        hidden_states=step.latents(step.batch, TOKENS, 4),
        encoder_hidden_states=step.fixed(step.batch, TEXT, DIM, salt=1),
        timestep=step.falling(1.0),
        img_ids=_grid(0, 3),
        txt_ids=_text_ids(3),
    )


def _flux(step: Step) -> dict:
    return dict(_base(step), pooled_projections=step.fixed(step.batch, DIM, salt=2))


def _flux_guided(step: Step) -> dict:
    return dict(_flux(step), guidance=torch.full((step.batch,), 3.5))


def _longcat(step: Step) -> dict:
    return dict(_base(step), guidance=torch.full((step.batch,), 3.5))


def _kontext(step: Step) -> dict:
    kwargs = _flux(step)
    reference = step.fixed(step.batch, TOKENS, 4, salt=3)
    kwargs["hidden_states"] = torch.cat([kwargs["hidden_states"], reference], dim=1)
    kwargs["img_ids"] = torch.cat([kwargs["img_ids"], _grid(1, 3)])
    return kwargs


def _residuals(
    step: Step, tokens: int, dim: int, salt: int, count: int = 2
) -> list[torch.Tensor]:
    """What a ControlNet hands over; it moves with the step, as the real one does."""
    return [0.3 * step.latents(step.batch, tokens, dim, salt=salt + i) for i in range(count)]


def _flux_controlnet(step: Step) -> dict:
    return dict(
        _flux(step),
        controlnet_block_samples=_residuals(step, TOKENS, 32, 10),
        controlnet_single_block_samples=_residuals(step, TOKENS, 32, 20),
    )


def _bria_controlnet(step: Step) -> dict:
    return dict(_base(step), controlnet_block_samples=_residuals(step, TOKENS, 32, 10))


def _chroma_controlnet(step: Step) -> dict:
    kwargs = _flux_controlnet(step)
    del kwargs["pooled_projections"]
    return kwargs


def _flux2(step: Step) -> dict:
    return dict(
        _base(step),
        img_ids=_grid(0, 4).expand(step.batch, -1, -1),
        txt_ids=_text_ids(4).expand(step.batch, -1, -1),
        guidance=torch.ones(step.batch),
    )


def _flux2_kv(step: Step) -> dict:
    """Reference tokens are part of the sequence at step 0 only; later steps read their keys from the cache."""
    from diffusers.models.transformers.transformer_flux2 import Flux2KVCache

    kwargs = _flux2(step)
    kwargs["kv_cache"] = step.once("kv_cache", lambda: Flux2KVCache(2, 2))
    kwargs["kv_cache_mode"] = "cached"
    if step.index == 0:
        reference = step.fixed(step.batch, TOKENS, 4, salt=3)
        ids = _grid(10, 4).expand(step.batch, -1, -1)
        kwargs.update(
            hidden_states=torch.cat([reference, kwargs["hidden_states"]], dim=1),
            img_ids=torch.cat([ids, kwargs["img_ids"]], dim=1),
            kv_cache_mode="extract",
            num_ref_tokens=TOKENS,
        )
    return kwargs


def _flux2_kv_processors(model: nn.Module) -> None:
    """As the pipeline does; the default processors ignore the cache."""
    from diffusers.models.transformers import transformer_flux2 as module

    for block in model.transformer_blocks:
        block.attn.set_processor(module.Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(module.Flux2KVParallelSelfAttnProcessor())


def _flux3(step: Step) -> dict:
    return dict(_base(step), img_ids=_grid(0, 4), txt_ids=_text_ids(4))


def _flux3_edit(step: Step) -> dict:
    return dict(
        _flux3(step),
        image_cond_hidden_states=step.fixed(step.batch, TOKENS, 4, salt=3),
        image_cond_ids=_grid(10, 4),
        target_timestep=torch.full((step.batch,), 1.0 - (step.index + 1) / step.total),
    )


def _fibo(step: Step) -> dict:
    layers = [step.fixed(step.batch, TEXT, 16, salt=30 + i) for i in range(4)]
    return dict(_base(step), text_encoder_layers=layers)


_FLUX = dict(_INIT, **_ROPE, pooled_projection_dim=DIM)
_FLUX2 = dict(_INIT, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4))
_FLUX3 = dict(
    in_channels=4,
    cond_in_channels=4,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=DIM,
    timestep_channels=16,
    axes_dims_rope=(4, 4, 4, 4),
)
_CHROMA = dict(
    _INIT,
    **_ROPE,
    approximator_num_channels=8,
    approximator_hidden_dim=16,
    approximator_layers=1,
)
_BRIA = dict(_INIT, **_ROPE, pooled_projection_dim=None)
_FLUX_PIPELINES = (
    "cache_context in flux only; the 13 others (img2img, fill, control, kontext, ...) without"
)
_CLASS = "FluxTransformer2DModel"

MODELS = table(
    TinyModel("flux", _CLASS, _FLUX, _flux, _DUAL, pipelines=_FLUX_PIPELINES),
    TinyModel(
        "flux_guidance", _CLASS, dict(_FLUX, guidance_embeds=True), _flux_guided, _DUAL
    ),
    TinyModel(
        "flux_kontext",
        _CLASS,
        _FLUX,
        _kontext,
        _DUAL,
        remarks="clean reference tokens follow the noisy ones in the stream",
    ),
    TinyModel(
        "flux_one_block",
        _CLASS,
        dict(_FLUX, num_layers=0, num_single_layers=1),
        _flux,
        ("single_transformer_blocks",),
        remarks="head and tail are the same block",
    ),
    TinyModel(
        "flux_controlnet",
        _CLASS,
        _FLUX,
        _flux_controlnet,
        _DUAL,
        remarks="residuals are added between the blocks",
    ),
    TinyModel(
        "flux2",
        "Flux2Transformer2DModel",
        _FLUX2,
        _flux2,
        _DUAL,
        pipelines="cache_context in klein and klein_inpaint; flux2 makes one call, klein_kv has none",
        remarks="the single blocks get [text, image] in one tensor; the text is cut off after them",
    ),
    TinyModel(
        "flux2_kv",
        "Flux2Transformer2DModel",
        _FLUX2,
        _flux2_kv,
        _DUAL,
        remarks="the sequence is shorter from step 1 on; step 0 returns the cache beside the sample",
        finish=_flux2_kv_processors,
    ),
    TinyModel(
        "flux3",
        "Flux3Transformer2DModel",
        _FLUX3,
        _flux3,
        ("mode_blocks.image", "single_transformer_blocks"),
        pipelines="modular pipeline only",
        remarks="txt_mode_blocks (same block class) run first, on the text alone; mode_blocks is a ModuleDict",
    ),
    TinyModel(
        "flux3_edit",
        "Flux3Transformer2DModel",
        dict(_FLUX3, flow_map=True),
        _flux3_edit,
        ("mode_blocks.image", "single_transformer_blocks"),
        pipelines="modular pipeline only",
        remarks="reference tokens pass mode_blocks.image_cond, join between the lists and are cut off after the stack",
    ),
    TinyModel(
        "longcat_image",
        "LongCatImageTransformer2DModel",
        dict(_INIT, **_ROPE, pooled_projection_dim=DIM),
        _longcat,
        _DUAL,
        pipelines="cache_context in both",
    ),
    TinyModel(
        "ovis_image",
        "OvisImageTransformer2DModel",
        dict(_INIT, **_ROPE, out_channels=4),
        _base,
        _DUAL,
        pipelines="cache_context",
    ),
    TinyModel("chroma", "ChromaTransformer2DModel", _CHROMA, _base, _DUAL),
    TinyModel(
        "chroma_controlnet", "ChromaTransformer2DModel", _CHROMA, _chroma_controlnet, _DUAL
    ),
    TinyModel(
        "bria",
        "BriaTransformer2DModel",
        _BRIA,
        _base,
        _DUAL,
        remarks="a block returns (text, image), the registry of diffusers says the opposite",
    ),
    TinyModel(
        "bria_controlnet",
        "BriaTransformer2DModel",
        _BRIA,
        _bria_controlnet,
        _DUAL,
        remarks="controlnet_single_block_samples cannot be given: the model cuts text off that is not in the stream",
    ),
    TinyModel(
        "bria_fibo",
        "BriaFiboTransformer2DModel",
        dict(_BRIA, text_encoder_dim=16),
        _fibo,
        _DUAL,
        remarks="the model writes one text encoder layer into half of the text channels before every block",
    ),
)
