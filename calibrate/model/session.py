"""A loaded model and its call: the one holder that record, plan and verify share."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from calibrate.errors import InvalidOption, InvalidPrompts
from calibrate.model.call import STEPS, Call
from calibrate.model.checkpoint import Checkpoint, slug_of
from calibrate.model.loading import load_pipeline
from calibrate.model.prompts import Prompt
from calibrate.model.protocol import Settings, canonical_sha256, plain
from coeffs import Protocol


@dataclass(frozen=True, kw_only=True)
class Session:
    """A loaded pipeline, or any callable, with the arguments of its every generation.

    Attributes:
        modules: Expert name -> denoiser.
        call: Arguments of every generation besides the prompt's own, and what the pipeline accepts.
        identity: The manifest's fields that a coefficient depends on, hashed in ``protocol_sha256``.
        pipeline: A diffusers pipeline; None for a callable.
        function: ``function(prompt, seed)`` runs one generation; None for a pipeline.
        loop: The :class:`runtime.OwnLoop` of a callable.
    """

    modules: Mapping[str, Any]
    call: Call
    identity: Settings
    pipeline: Any = None
    function: Callable[..., Any] | None = None
    loop: Any = None

    @property
    def target(self) -> Any:
        """What a cache is applied to."""
        return self.loop if self.pipeline is None else self.pipeline

    def driven_by(self, copied: Any) -> "Session":
        """The same with a copy of its pipeline or loop."""
        return replace(self, **{"loop" if self.pipeline is None else "pipeline": copied})

    @property
    def driver(self) -> Any:
        """Whose scheduler is read; None where there is none."""
        return self.loop.driver if self.pipeline is None else self.pipeline

    @property
    def blocks(self) -> Any:
        """The block stack where it was named by hand."""
        return None if self.loop is None else self.loop.blocks

    @property
    def arguments(self) -> Settings:
        return self.call.arguments

    @property
    def num_steps(self) -> int | None:
        """Denoising steps of a generation; None for a callable that does not say."""
        return self.call.protocol.get("num_steps")

    @property
    def deployed(self) -> Settings:
        """What runs besides weights and arguments: classes of the denoisers, dtype and kind of device."""
        modules = self.modules.values()
        first = next(parameter for module in modules for parameter in module.parameters())
        return {
            "classes": [type(module).__name__ for module in modules],
            "dtype": str(first.dtype),
            "device": str(first.device.type),
        }

    @property
    def solver_is_replaceable(self) -> bool:
        """Whether generations can be given a scheduler of their own, by which their solver is watched."""
        scheduler = getattr(self.driver, "scheduler", None)
        return hasattr(scheduler, "step") and (
            self.function is None or self.accepts("scheduler")
        )

    def accepts(self, name: str) -> bool:
        """Whether the pipeline takes an argument of this name."""
        return self.call.accepts(name)

    @property
    def device_name(self) -> str:
        """The device in words: a GPU by its product name."""
        import torch

        device = getattr(self.pipeline, "_execution_device", None)
        if device is None:
            first = next(iter(self.modules.values()))
            device = next(first.parameters(), torch.empty(0)).device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def generate(
        self, prompt: Prompt, images: Mapping[str, Path] | None = None, **overrides: Any
    ) -> Any:
        """Run one whole generation and return what the pipeline or the callable returned.

        ``images`` says where the images that the prompt names are; ``overrides`` are arguments of this call alone.
        """
        import torch

        if self.function is not None:
            return self._call_function(prompt, {**self.arguments, **overrides})
        arguments = {**self.arguments, "prompt": prompt.prompt, **overrides}
        if prompt.negative_prompt is not None:
            arguments["negative_prompt"] = prompt.negative_prompt
        if prompt.image:
            opened = [_opened((images or {})[name]) for name in prompt.image]
            arguments["image"] = opened[0] if len(opened) == 1 else opened
        generator = torch.Generator("cpu").manual_seed(prompt.seed)
        return self.pipeline(**arguments, generator=generator)

    def _call_function(self, prompt: Prompt, arguments: Settings) -> Any:
        assert self.function is not None
        steps = arguments.pop(STEPS, None)
        if prompt.image or prompt.negative_prompt is not None or arguments:
            raise InvalidOption(
                "generate(prompt, seed) takes no image, no negative prompt and no argument but num_steps"
            )
        options = {} if steps is None else {"num_steps": steps}
        if self.accepts("scheduler"):
            options["scheduler"] = self.loop.scheduler
        return self.function(prompt.prompt, prompt.seed, **options)


def load_session(checkpoint: Checkpoint, call: Call, **loading: Any) -> Session:
    """Load the checkpoint's weights (a pipeline that is loaded already is used as it is).

    ``loading`` are the options of :func:`calibrate.model.loading.load_pipeline`.
    """
    from runtime import denoisers

    pipeline = checkpoint.pipeline or load_pipeline(checkpoint, **loading)
    modules = denoisers(pipeline)
    scheduler = getattr(pipeline, "scheduler", None)
    weights = checkpoint.as_dict()
    kind = type(pipeline).__name__
    identity = _identity(checkpoint.slug, modules, kind, weights, scheduler, call.protocol)
    return Session(modules=modules, call=call, identity=identity, pipeline=pipeline)


def callable_session(
    name: str,
    generate: Callable[..., Any],
    modules: Any,
    settings: Settings,
    blocks: Sequence[str] | None = None,
) -> Session:
    """Any ``generate(prompt, seed)`` with its denoiser: a module, expert name -> module, or an OwnLoop.

    Where it also takes ``num_steps``, it is given the protocol's, and fewer of them can be compared with.
    """
    from runtime import OwnLoop

    if modules is None:
        raise InvalidOption(
            "generate without modules: name the denoiser to watch, such as modules=model.transformer"
        )
    loop = modules if isinstance(modules, OwnLoop) else OwnLoop(modules, blocks=blocks)
    taken = set(inspect.signature(generate).parameters)
    accepted = (
        {"prompt"} | taken & {"scheduler"} | ({STEPS} if "num_steps" in taken else set())
    )
    stated = settings.get("num_steps")
    arguments = {STEPS: stated} if stated and STEPS in accepted else {}
    weights = {"repository": name, "revision": None, "sha256": None}
    return Session(
        modules=loop.modules,
        call=Call(arguments=arguments, accepted=frozenset(accepted), protocol=settings),
        identity=_identity(
            slug_of(name), loop.modules, None, weights, loop.scheduler, settings
        ),
        function=generate,
        loop=loop,
    )


def _identity(
    model: str,
    modules: Mapping[str, Any],
    pipeline_class: str | None,
    checkpoint: dict[str, str | None],
    scheduler: Any,
    settings: Settings,
) -> Settings:
    from runtime.facts import settings_of

    protocol = {**settings_of(scheduler, next(iter(modules.values()))), **settings}
    config = plain(dict(getattr(scheduler, "config", None) or {}))
    identity = {
        "model": model,
        "transformer_classes": {
            name: type(module).__name__ for name, module in modules.items()
        },
        "pipeline_class": pipeline_class,
        "checkpoint": checkpoint,
        # Everything that a coefficient depends on besides weights and prompt; None where there is no such setting.
        "protocol": plain({name: protocol.get(name) for name in vars(Protocol())}),
        # Names with an underscore say where the configuration came from, not what it is.
        "scheduler_config": {key: config[key] for key in config if not key.startswith("_")},
    }
    return {**identity, "protocol_sha256": canonical_sha256(identity)}


@lru_cache(maxsize=8)  # a verification runs the same prompt under many settings
def _opened(path: Path) -> Any:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except OSError as error:
        raise InvalidPrompts(
            f"{path}: cannot be read as an image ({error}); give it again with --image"
        ) from None
