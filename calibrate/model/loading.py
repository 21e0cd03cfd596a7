"""A checkpoint's pipeline, loaded from safetensors onto its device."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from calibrate.errors import InvalidCheckpoint, InvalidOption, one_line
from calibrate.model.checkpoint import Checkpoint, model_index

DTYPES = ("bfloat16", "float16", "float32")


def load_pipeline(
    checkpoint: Checkpoint,
    *,
    dtype: str = "bfloat16",
    device: str = "auto",
    allow_pickle: bool = False,
    cpu_offload: bool = False,
) -> Any:
    """The pipeline on its device, from safetensors and without code of the checkpoint."""
    import torch
    from diffusers import DiffusionPipeline

    device = pick_device(device)
    if device.startswith("cuda"):
        torch.cuda.set_device(
            device
        )  # what is allocated without naming a device belongs there too
    folder = checkpoint.folder
    assert folder is not None
    # Components that were saved as none (Stable Diffusion 3 without its T5), which diffusers wants to be told.
    absent = {
        name: None for name, value in model_index(folder).items() if value == [None, None]
    }
    embedded = checkpoint.spec and checkpoint.spec.embedded
    try:
        with _quiet() if embedded else nullcontext():
            pipeline = DiffusionPipeline.from_pretrained(
                str(folder),
                dtype=getattr(torch, dtype),
                use_safetensors=None if allow_pickle else True,
                trust_remote_code=False,
                local_files_only=True,
                **absent,
            )
        if cpu_offload:
            pipeline.enable_model_cpu_offload(device=device)
            return pipeline
        return pipeline.to(device)
    except torch.OutOfMemoryError as error:
        raise InvalidOption(
            f"{checkpoint.repository}: does not fit on {device} ({one_line(error)}); try --cpu-offload"
        ) from None
    except (
        Exception
    ) as error:  # whatever a damaged or incomplete folder makes diffusers raise
        raise InvalidCheckpoint(
            f"{checkpoint.repository}: diffusers cannot load it as {checkpoint.pipeline_class} "
            f"({type(error).__name__}: {one_line(error)}); check that the folder is complete and diffusers new enough"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Load without bars and type hints: the embedded model takes a tokenizer where its class asks for a processor."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()


def pick_device(device: str = "auto") -> str:
    """``auto`` is this process's GPU (``LOCAL_RANK`` under torchrun) when there is one, else the CPU."""
    import torch

    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", device):
        raise InvalidOption(f"--device {device}: expected auto, cpu or cuda")
    available = torch.cuda.is_available()
    if device == "cpu" or (device == "auto" and not available):
        return "cpu"
    if not available:
        raise InvalidOption(f"--device {device}: torch sees no GPU here; use --device cpu")
    count = torch.cuda.device_count()
    own = int(os.environ.get("LOCAL_RANK", 0)) % count
    index = int(device.partition(":")[2] or own)
    if index >= count:
        raise InvalidOption(
            f"--device {device}: torch sees {count} GPUs, counted from cuda:0"
        )
    return f"cuda:{index}"
