"""What a loaded pipeline says about itself, in the registry's words: to find the entry that fits it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.nn import Module

from runtime.watch.scheduler import OwnLoop


def facts_of(target: Any, modules: Mapping[str, Module]) -> dict[str, Any]:
    """Facts for :func:`coeffs.find` about a pipeline, a loop of one's own, or a bare denoiser."""
    scheduler = getattr(target, "scheduler", None)
    settings = [settings_of(scheduler, module) for module in modules.values()]
    is_pipeline = not isinstance(target, Module | OwnLoop)
    return {
        "transformer_class": class_name(next(iter(modules.values()))),
        "pipeline_class": type(target).__name__ if is_pipeline else None,
        "checkpoint": repository_of(target) if is_pipeline else None,
        # Any of several denoisers may be quantised or have an adapter.
        **{
            name: next(
                (stated[name] for stated in settings if stated[name] is not None), None
            )
            for name in settings[0]
        },
    }


def settings_of(scheduler: Any, denoiser: Module) -> dict[str, Any]:
    """What an entry's protocol states of them; ``None`` where there is none of a thing, or it is not known."""
    config = getattr(scheduler, "config", None) or {}
    # A shift that follows the size of the image is no fixed one.
    shift = None if config.get("use_dynamic_shifting") else config.get("shift")
    dtype = getattr(denoiser, "dtype", None)
    if dtype is None:
        dtype = next((parameter.dtype for parameter in denoiser.parameters()), None)
    adapters = getattr(denoiser, "peft_config", None) or ()
    return {
        "scheduler": None if scheduler is None else type(scheduler).__name__,
        "shift": float(shift) if isinstance(shift, int | float) else None,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "quantization": _quantization(denoiser),
        "lora": ", ".join(sorted(adapters)) or None,
    }


def _quantization(denoiser: Module) -> str | None:
    """Name of the quantisation method of a denoiser's weights, or of the class or dtype that gives it away, if any."""
    config = getattr(getattr(denoiser, "config", None), "quantization_config", None)
    values = config if isinstance(config, Mapping) else {}
    method = values.get("quant_method", getattr(config, "quant_method", None))
    if method is not None:
        return str(getattr(method, "value", method))
    for (
        module
    ) in denoiser.modules():  # torch.ao and diffusers put layers of their own in place
        if "quantiz" in type(module).__module__:
            return type(module).__name__
    for parameter in denoiser.parameters():
        if not type(parameter).__module__.startswith("torch."):  # torchao, bitsandbytes
            return type(parameter).__name__
        if parameter.element_size() < 2:
            return str(parameter.dtype).removeprefix("torch.")
    return None


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
    is_folder = Path(name).is_absolute() or Path(name).is_dir()
    return (Path(name).name if is_folder else name) or None
