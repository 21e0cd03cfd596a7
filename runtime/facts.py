"""What a loaded pipeline says about itself, in the registry's words: to find the entry that fits it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.nn import Module

from runtime.watch.scheduler import OwnLoop


def facts_of(target: Any, modules: Mapping[str, Module]) -> dict[str, Any]:
    """Facts for :func:`coeffs.find` about a pipeline, a loop of one's own, or a bare denoiser."""
    first = next(iter(modules.values()))
    is_pipeline = not isinstance(target, Module | OwnLoop)
    scheduler = getattr(target, "scheduler", None)
    return {
        "transformer_class": class_name(first),
        "pipeline_class": type(target).__name__ if is_pipeline else None,
        "checkpoint": repository_of(target) if is_pipeline else None,
        "scheduler": type(scheduler).__name__ if scheduler is not None else None,
        "shift": shift_of(scheduler),
        "dtype": dtype_of(first),
        "quantization": quantization_of(first),
        "lora": lora_of(first),
    }


def dtype_of(module: Module) -> str | None:
    """The dtype that a denoiser states, or of its first parameter."""
    dtype = getattr(module, "dtype", None)
    if dtype is None:
        dtype = next((parameter.dtype for parameter in module.parameters()), None)
    return None if dtype is None else str(dtype).removeprefix("torch.")


def class_name(module: Module) -> str:
    """The denoiser's own class, also where FSDP has put one of its own in front of it."""
    return next(
        cls.__name__
        for cls in type(module).__mro__
        if not cls.__module__.startswith("torch.distributed.")
    )


def repository_of(pipeline: Any) -> str | None:
    """The hub id that a pipeline came from, or the name of its folder: never a machine's path."""
    name = str(getattr(getattr(pipeline, "config", None), "_name_or_path", "") or "")
    if not name:
        return None
    return Path(name).name if Path(name).is_absolute() or Path(name).is_dir() else name


def shift_of(scheduler: Any) -> float | None:
    """The fixed time shift of a flow-matching scheduler; ``None`` where there is none or it follows the size."""
    config = getattr(scheduler, "config", None) or {}
    shift = config.get("shift")
    if not isinstance(shift, int | float) or config.get("use_dynamic_shifting"):
        return None
    return float(shift)


def quantization_of(module: Module) -> str | None:
    """Name of the quantisation method of a denoiser's weights, if any."""
    config = getattr(getattr(module, "config", None), "quantization_config", None)
    method = (
        config.get("quant_method")
        if isinstance(config, Mapping)
        else getattr(config, "quant_method", None)
    )
    return str(getattr(method, "value", method)) if method is not None else None


def lora_of(module: Module) -> str | None:
    """Names of the adapters loaded into a denoiser, if any."""
    return ", ".join(sorted(getattr(module, "peft_config", None) or ())) or None
