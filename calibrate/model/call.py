"""What a pipeline is called with: options, the table's defaults and its own, checked against its signature."""

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from calibrate.errors import InvalidOption
from calibrate.model.prompts import Prompt
from calibrate.model.protocol import Settings
from calibrate.model.table import ModelSpec
from calibrate.text import did_you_mean
from coeffs.entry.fields import stated

MIN_STEPS = 2  # one pair needs two steps
STEPS = "num_inference_steps"
_SIZES = ("height", "width", "num_frames")
# Ours to give: the recording sets them for every prompt.
_RESERVED = {"prompt", "generator", "image", "num_images_per_prompt", "num_videos_per_prompt"}


@dataclass(frozen=True, kw_only=True)
class Call:
    """What every generation is called with.

    Attributes:
        arguments: Keyword arguments besides the prompt's own.
        accepted: Names that the pipeline takes; None where it takes any.
        protocol: What the manifest says about the call.
    """

    arguments: Settings
    accepted: frozenset[str] | None
    protocol: Settings = field(default_factory=dict)
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
                        f"prompt {prompt.prompt!r}: the pipeline takes no {name}"
                    )
            if self.needs_image and not prompt.image:
                raise InvalidOption(
                    f"prompt {prompt.prompt!r} has no image, which the pipeline needs; give --image FILE"
                )


def prepare_call(
    pipeline_call: Callable,
    spec: ModelSpec | None,
    *,
    pipe_args: Settings | None = None,
    **options: float | None,
) -> Call:
    """Merge the pipeline's own defaults, the table's and the options, the latter winning.

    ``options`` are steps, guidance_scale, height, width and num_frames. A default of the table that the pipeline does
    not take is left out; an option that it does not take is an error.
    """
    parameters = dict(inspect.signature(pipeline_call).parameters)
    parameters.pop("self", None)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    accepted = None if open_ended else frozenset(parameters)
    guidance = (spec and spec.guidance_argument) or _guidance_argument(parameters)
    argument_of = {"steps": STEPS, "guidance_scale": guidance}
    given = dict(pipe_args or {})
    for name in given:
        _refuse_argument(name, f"--pipe-arg {name}", accepted)
    for option, value in options.items():
        name, flag = argument_of.get(option, option), f"--{option.replace('_', '-')}"
        if value is None:
            continue
        if name in given:
            raise InvalidOption(
                f"{flag} and --pipe-arg {name} set the same argument; give one of them"
            )
        _refuse_argument(name, flag, accepted)
        given[name] = value
    known = {} if spec is None else _table_defaults(spec, guidance)
    arguments = {
        name: known[name] for name in known if open_ended or name in parameters
    } | given
    settings = {name: p.default for name, p in parameters.items() if _is_number(p.default)}
    settings |= arguments
    steps = settings.get(STEPS)
    if steps is not None and (not isinstance(steps, int) or steps < MIN_STEPS):
        raise InvalidOption(
            f"--steps {steps}: a pair needs two steps; expected a whole number from {MIN_STEPS}"
        )
    named = {STEPS, "guidance_scale", *_SIZES}
    protocol = {
        "num_steps": steps,
        "guidance_scale": settings.get(guidance),
        **{name: settings.get(name) for name in _SIZES},
        "call_arguments": {name: arguments[name] for name in arguments if name not in named},
    }
    image = parameters.get("image")
    required = image is not None and image.default is image.empty
    return Call(
        arguments=arguments,
        accepted=accepted,
        protocol=protocol,
        needs_image=required or bool(spec and spec.needs_image),
    )


def _refuse_argument(name: str, flag: str, accepted: frozenset[str] | None) -> None:
    if name in _RESERVED:
        raise InvalidOption(
            f"{flag}: it is set for every prompt; use --prompts, --image or --seed"
        )
    if accepted is not None and name not in accepted:
        hint = did_you_mean(name, accepted) or (
            f"it takes {', '.join(sorted(accepted - _RESERVED))}"
        )
        raise InvalidOption(f"{flag}: the pipeline takes no argument {name!r}; {hint}")


def _table_defaults(spec: ModelSpec, guidance: str) -> Settings:
    values = {STEPS: spec.num_steps, guidance: spec.guidance_scale}
    values |= {name: getattr(spec, name) for name in _SIZES}
    return stated(values) | spec.call_arguments


def _guidance_argument(parameters: Mapping[str, inspect.Parameter]) -> str:
    """``true_cfg_scale`` where ``guidance_scale`` is there for distilled models only (Qwen-Image), else the latter."""
    usual = parameters.get("guidance_scale")
    if "true_cfg_scale" in parameters and (usual is None or usual.default is None):
        return "true_cfg_scale"
    return "guidance_scale"


def call_text(protocol: Settings) -> str:
    """``28 steps, guidance 4.5, 1024x1024, bfloat16``: what is known of it."""
    sizes = filter(None, map(protocol.get, ("width", "height", "num_frames")))
    steps, guidance = protocol.get("num_steps"), protocol.get("guidance_scale")
    parts = [
        f"{steps} steps" if steps else "",
        "" if guidance is None else f"guidance {guidance:g}",
        "x".join(map(str, sizes)) or "the pipeline's own size",
        protocol.get("dtype"),
    ]
    return ", ".join(filter(None, parts))


def parse_pipe_args(pairs: Iterable[str]) -> Settings:
    """``KEY=VALUE`` texts as arguments: true, false, null, numbers, JSON lists and objects; anything else is text."""
    arguments: Settings = {}
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


def recorded_arguments(protocol: Settings) -> Settings:
    """The call arguments that an entry states, as they were given: it keeps lists and mappings as JSON text."""
    return {
        name: _value(value) if isinstance(value, str) else value
        for name, value in protocol["call_arguments"].items()
    }


def _value(text: str) -> Any:
    # Python's spelling is taken too.
    spelled = {"true": "true", "false": "false", "none": "null"}.get(text.lower(), text)
    try:
        return json.loads(spelled, parse_constant=_refuse_constant)
    except json.JSONDecodeError:
        return text


def _refuse_constant(name: str) -> None:
    raise InvalidOption(f"--pipe-arg value {name}: expected a finite number")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
