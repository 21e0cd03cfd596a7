"""Classes of diffusers.models.transformers without a tiny model, and why: nothing is left out silently."""

_UNET_PART = (
    "a part of a UNet, not a denoiser: its few blocks are one of many attention levels"
)

UNCOVERED: dict[str, str] = {
    "DreamLiteTransformer2DModel": _UNET_PART + " (DreamLite)",
    "DualTransformer2DModel": _UNET_PART
    + " (two Transformer2DModels side by side, Versatile Diffusion)",
    "MiniMaxMusic3RVQDepthDecoder": "an autoregressive token decoder; nothing is denoised",
    "PriorTransformer": "predicts an image embedding (unCLIP priors); the decoder after it, a UNet, is the cost",
    "TransformerTemporalModel": _UNET_PART + " (motion modules)",
}
