"""What a pipeline is called with: options, the table's defaults and its own, checked against its signature."""

import difflib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from calibrate.errors import InvalidOption
from calibrate.model.prompts import Prompt
from calibrate.model.table import ModelSpec

MIN_STEPS = 2  # one pair needs two steps
_STEPS = "num_inference_steps"
_SIZES = ("height", "width", "num_frames")
# Ours to give: the recording sets them for every prompt.
_RESERVED = {
    "prompt",
    "generator",
    "image",
    "negative_prompt",
    "num_images_per_prompt",
    "num_videos_per_prompt",
}


@dataclass(frozen=True, kw_only=True)
class Call:
    """Keyword arguments of every generation besides the prompt's own, and what the protocol says about them."""

    arguments: dict[str, Any]
    accepted: frozenset[str] | None  # None: the pipeline takes any
    protocol: dict[str, Any] = field(default_factory=dict)

    needs_image: bool = False

    def accepts(self, name: str) -> bool:
        return self.accepted is None or name in self.accepted

    def refuse_unfit(self, prompts: Iterable[Prompt]) -> None:
        """Refuse prompts that carry what the pipeline does not take, or lack the image that it needs."""
        if not self.accepts("prompt"):
            raise InvalidOption(
                "the pipeline takes no text prompt; hand it to calibrate.record with generate=..."
            )
        for prompt in prompts:
            for name in ("negative_prompt", "image"):
                if getattr(prompt, name) and not self.accepts(name):
                    raise InvalidOption(
                        f"prompt {prompt.prompt!r} has one, but the pipeline takes no {name}"
                    )
            if self.needs_image and not prompt.image:
                raise InvalidOption(
                    f"prompt {prompt.prompt!r} has no image, which the pipeline needs; give --image FILE"
                )


def parse_pipe_args(pairs: Iterable[str]) -> dict[str, Any]:
    """``KEY=VALUE`` texts as arguments: true, false, null, numbers, JSON lists and objects; anything else is text."""
    arguments = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals or not key.isidentifier():
            raise InvalidOption(
                f"--pipe-arg {pair}: expected KEY=VALUE, such as enable_prompt_rewrite=false"
            )
        if key in arguments:
            raise InvalidOption(f"--pipe-arg {key}: given twice; give it once")
        arguments[key] = _value(text.strip())
    return arguments


def prepare_call(
    pipeline_call: Callable,
    spec: ModelSpec | None,
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    pipe_args: Mapping[str, Any] | None = None,
) -> Call:
    """Merge the pipeline's own defaults, the table's and the options, the latter winning.

    A default of the table that the pipeline does not take is left out; an option that it does not take is an error.
    """
    parameters = {
        name: p for name, p in inspect.signature(pipeline_call).parameters.items() if name != "self"
    }
    accepted = (
        None if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else frozenset(parameters)
    )
    guidance = (spec and spec.guidance_argument) or _guidance_argument(parameters)
    sizes = {"height": height, "width": width, "num_frames": num_frames}
    explicit = dict(pipe_args or {})
    flags = {name: f"--pipe-arg {name}" for name in explicit}
    for name, value, flag in (
        (_STEPS, steps, "--steps"),
        (guidance, guidance_scale, "--guidance-scale"),
        *((name, value, f"--{name.replace('_', '-')}") for name, value in sizes.items()),
    ):
        if value is not None:
            if name in explicit:
                raise InvalidOption(
                    f"{flag} and --pipe-arg {name} set the same argument; give one of them"
                )
            explicit[name], flags[name] = value, flag
    for name in explicit:
        if name in _RESERVED - {"negative_prompt"}:
            raise InvalidOption(
                f"{flags[name]}: the recording sets it for every prompt; use --prompts, --image or --seed"
            )
        if accepted is not None and name not in accepted:
            raise InvalidOption(
                f"{flags[name]}: the pipeline takes no argument {name!r}{_nearest(name, accepted)}"
            )
    defaults = _table_defaults(spec, guidance)
    arguments = {
        name: value for name, value in defaults.items() if accepted is None or name in accepted
    } | explicit
    settings = {
        name: p.default for name, p in parameters.items() if _is_number(p.default)
    } | arguments
    num_steps = settings.get(_STEPS)
    if num_steps is not None and (not isinstance(num_steps, int) or num_steps < MIN_STEPS):
        raise InvalidOption(
            f"--steps {num_steps}: a pair needs two steps; expected a whole number from {MIN_STEPS}"
        )
    protocol = {"num_steps": num_steps, "guidance_scale": settings.get(guidance)}
    protocol |= {name: settings.get(name) for name in _SIZES}
    shown = {_STEPS, "guidance_scale", *_SIZES}
    protocol["call_arguments"] = {
        name: value for name, value in arguments.items() if name not in shown
    }
    image = parameters.get("image")
    needs_image = bool(spec and spec.needs_image) or (
        image is not None and image.default is image.empty
    )
    return Call(arguments=arguments, accepted=accepted, protocol=protocol, needs_image=needs_image)


def _table_defaults(spec: ModelSpec | None, guidance: str) -> dict[str, Any]:
    if spec is None:
        return {}
    values = {_STEPS: spec.num_steps, guidance: spec.guidance_scale}
    values |= {name: getattr(spec, name) for name in _SIZES}
    return {
        name: value for name, value in values.items() if value is not None
    } | spec.call_arguments


def _guidance_argument(parameters: Mapping[str, inspect.Parameter]) -> str:
    """``true_cfg_scale`` where ``guidance_scale`` is there for distilled models only (Qwen-Image), else the latter."""
    usual = parameters.get("guidance_scale")
    if "true_cfg_scale" in parameters and (usual is None or usual.default is None):
        return "true_cfg_scale"
    return "guidance_scale"


def _value(text: str) -> Any:
    if text.lower() in {"true", "false", "null", "none"}:
        return {"true": True, "false": False}.get(text.lower())
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError:
        return text


def _refuse_constant(name: str) -> None:
    raise InvalidOption(f"--pipe-arg value {name}: expected a finite number")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _nearest(name: str, accepted: frozenset[str]) -> str:
    close = difflib.get_close_matches(name, sorted(accepted), n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; it takes {', '.join(sorted(accepted - _RESERVED))}"
