"""The entry: what a calibration is worth and where it comes from, as frozen dataclasses.

The annotations below are the one definition of the format. They check every value (built in Python or read from a
file), decide what is written, and give the JSON Schema in ``schema.json``.
"""

import dataclasses
import functools
import math
import numbers
import re
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from coeffs.errors import EntryError, InvalidPolynomial
from coeffs.polynomial import Polynomial
from coeffs.yamlio import number_hint

SCHEMA = 1
MAX_NUMBER = 1e30
MAX_TEXT = 8000
CONTROL_X = 0.1


@dataclass(frozen=True)
class Limits:
    """Bounds of a number (both included), used inside ``Annotated``."""

    low: float = -MAX_NUMBER
    high: float = MAX_NUMBER


@dataclass(frozen=True)
class Pattern:
    """A regular expression that the whole text must match, with the words that an error uses for it."""

    regex: str
    words: str


_SEGMENT = r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?"
Slug = Annotated[
    str, Pattern(f"{_SEGMENT}(?:/{_SEGMENT})?", "a name such as longcat-image or vllm-omni/longcat-image")
]
Name = Annotated[str, Pattern(r"[A-Za-z_][A-Za-z0-9_.-]{0,127}", "a name of letters, digits and _.-")]
Sha256 = Annotated[str, Pattern(r"[0-9a-f]{64}", "64 hexadecimal digits")]
Schedule = Annotated[str, Pattern(r"[CS]{1,10000}", "letters C (compute) and S (skip), one per step")]
Count = Annotated[int, Limits(0, 10**12)]
Steps = Annotated[int, Limits(1, 10_000)]
Pixels = Annotated[int, Limits(1, 10**6)]
Positive = Annotated[float, Limits(0)]
Scalar = str | int | float | bool | None


class Record:
    """Base of the dataclasses: checks and normalises every field on construction (lists become tuples)."""

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if value is None and spec.default is None:
                continue
            try:
                object.__setattr__(self, spec.name, _checker(spec.type)(value))
            except EntryError as error:
                raise error.under(spec.name) from None
        self._check()

    def _check(self) -> None:
        """Rules that span several fields."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Record):
    """Which weights: hub repository or folder name, revision, and the SHA-256 of the weights where known."""

    repository: str | None = None
    revision: str | None = None
    sha256: Sha256 | None = None


@dataclass(frozen=True, kw_only=True)
class Protocol(Record):
    """How images were generated while measuring; ``None`` means not stated by the source."""

    scheduler: str | None = None
    num_steps: Steps | None = None
    shift: float | str | None = None
    guidance_scale: float | None = None
    height: Pixels | None = None
    width: Pixels | None = None
    num_frames: Pixels | None = None
    dtype: str | None = None
    quantization: str | None = None
    lora: str | None = None
    call_arguments: dict[Name, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Counts(Record):
    """What the fit saw."""

    prompts: Count | None = None
    trajectories: Count | None = None
    pairs: Count | None = None
    excluded_non_finite: Count | None = None


@dataclass(frozen=True, kw_only=True)
class Candidate(Record):
    """One fitted polynomial with its domain and figures.

    ``value_at_0p1`` is the bare polynomial's value at x = 0.1. It is filled in when missing and compared when stored,
    so that a list pasted in the other order cannot be loaded.
    """

    coefficients_high_to_low: tuple[float, ...]
    degree: Annotated[int, Limits(0, 6)] | None = None
    method: Literal["polyfit", "constrained", "published"] = "polyfit"
    value_at_0p1: float | None = None
    domain: tuple[float, float] | None = None
    counts: Counts | None = None
    figures: dict[Name, float | None] | None = None
    intervals: dict[Name, tuple[tuple[float, float], ...]] | None = None
    why: str | None = None

    def polynomial(self, sign_rule: str = "clamp") -> Polynomial:
        """The polynomial under ``sign_rule`` (an entry's ``sign_rule``)."""
        return Polynomial(self.coefficients_high_to_low, self.domain, sign_rule)

    def _check(self) -> None:
        try:
            raw = self.polynomial().raw
        except InvalidPolynomial as error:
            raise EntryError(str(error)) from None
        degree = len(self.coefficients_high_to_low) - 1
        if self.degree not in (None, degree):
            problem = f"{self.degree}, but {degree + 1} coefficients have degree {degree}"
            raise EntryError(f"{problem}: correct one of them", ("degree",))
        object.__setattr__(self, "degree", degree)
        if self.value_at_0p1 is None:
            check_order(self.coefficients_high_to_low, self.domain)
            object.__setattr__(self, "value_at_0p1", _number(raw(CONTROL_X)))
        else:
            _check_control_value(self.coefficients_high_to_low, self.value_at_0p1)
        if self.intervals and len(self.intervals.get("coefficients", ())) not in (0, degree + 1):
            raise EntryError(f"expected one interval per coefficient ({degree + 1})", ("intervals", "coefficients"))


@dataclass(frozen=True, kw_only=True)
class Fit(Candidate):
    """The fit that is used, with the ones that were tried and why this one was chosen."""

    alternatives: tuple[Candidate, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Expert(Record):
    """One denoiser of the pipeline: a fit and MagCache ratios per branch (``pooled``, ``cond``, ``uncond``).

    Ratios are one per step of the schedule: index = step, 1 at step 0.
    """

    recommended: Name | None = None
    branches: dict[Name, Fit] = field(default_factory=dict)
    mag_ratios: dict[Name, tuple[float, ...]] | None = None

    def _check(self) -> None:
        if self.branches and self.recommended not in self.branches:
            problem = f"{self.recommended!r}: expected one of the branches {', '.join(self.branches)}"
            raise EntryError(problem, ("recommended",))
        if self.recommended and not self.branches:
            raise EntryError(f"{self.recommended!r}, but there are no branches", ("recommended",))


@dataclass(frozen=True, kw_only=True)
class Threshold(Record):
    """What a threshold costs and gives with this entry's polynomial; a threshold means nothing without it."""

    threshold: Positive
    computed_steps: Annotated[float, Limits(0, 10_000)] | None = None
    num_steps: Steps | None = None
    speedup: Positive | None = None
    psnr_db: float | None = None
    ssim: float | None = None
    ms_ssim: float | None = None
    latent_rel_l2: Positive | None = None
    worst_psnr_db: float | None = None
    kind: Literal["replay", "verified", "reported"]
    hardware: str | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Plan(Record):
    """A fixed schedule: C computes, S skips, one letter per step."""

    schedule: Schedule
    computed_steps: Count | None = None
    sigmas: tuple[float, ...] | None = None
    forecast: str | None = None
    figures: dict[Name, float | None] | None = None

    def _check(self) -> None:
        computed = self.schedule.count("C")
        if self.computed_steps not in (None, computed):
            raise EntryError(f"{self.computed_steps}, but the schedule computes {computed}", ("computed_steps",))
        object.__setattr__(self, "computed_steps", computed)


@dataclass(frozen=True, kw_only=True)
class Source(Record):
    """Where the numbers come from; free of machine paths."""

    run_id: str | None = None
    log_sha256: Sha256 | None = None
    toolkit: str | None = None
    torch: str | None = None
    diffusers: str | None = None
    device: str | None = None
    command: str | None = None
    created: str | None = None
    url: str | None = None
    reference: str | None = None


@dataclass(frozen=True, kw_only=True)
class Entry(Record):
    """One version of one model's calibration. Construction checks everything and raises ``EntryError``."""

    schema: int = SCHEMA
    model: Slug
    version: Annotated[int, Limits(0, 1_000_000)] = 0
    status: Literal["measured", "published", "copied"]
    copied_from: str | None = None
    title: str | None = None
    engine: str | None = None
    transformer_class: str | None = None
    pipeline_class: str | None = None
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    signal: Literal["modulated_input", "time_embedding", "other"]
    signal_note: str | None = None
    target: Literal["output", "hidden", "residual", "unknown"]
    sign_rule: Literal["clamp", "signed", "abs"] = "clamp"
    protocol: Protocol = field(default_factory=Protocol)
    experts: dict[Name, Expert]
    max_skips: Steps | None = None
    start: int | float | None = None
    end: int | float | None = None
    thresholds: tuple[Threshold, ...] = ()
    plans: tuple[Plan, ...] | None = None
    warnings: tuple[str, ...] = ()
    notes: str | None = None
    source: Source = field(default_factory=Source)

    def _check(self) -> None:
        if self.schema != SCHEMA:
            raise EntryError(f"{self.schema}: expected {SCHEMA}", ("schema",))
        if (self.status == "copied") != (self.copied_from is not None):
            raise EntryError(
                f"{self.copied_from!r} with status {self.status}: only a copied entry says from whom, and must",
                ("copied_from",),
            )
        if not self.experts:
            raise EntryError("no expert: expected at least transformer", ("experts",))
        for name, expert in self.experts.items():
            if not (expert.branches or expert.mag_ratios or self.plans):
                raise EntryError("no fit, no mag_ratios and no plan: nothing to use", ("experts", name))
        for name in ("start", "end"):
            _check_window(getattr(self, name), name)

    @property
    def label(self) -> str:
        return f"{self.model}@v{self.version}"

    def fit(self, expert: str = "transformer", branch: str | None = None) -> Fit:
        """The fit of a branch; the recommended one for ``None`` or a branch that has no fit of its own.

        Raises:
            EntryError: If the entry has no such expert, or only ratios or plans for it.
        """
        if expert not in self.experts:
            raise EntryError(f"{self.label} has no expert {expert!r}: expected one of {', '.join(self.experts)}")
        found = self.experts[expert]
        if not found.branches:
            raise EntryError(f"{self.label} has no coefficients for {expert}, only mag_ratios or plans")
        return found.branches.get(branch or found.recommended, found.branches[found.recommended])


def check_order(coefficients_high_to_low: tuple[float, ...], domain: tuple[float, float] | None = None) -> None:
    """Refuse a list that is plausible only when read lowest power first.

    The rule: relative changes between neighbouring steps lie well below 3. A list is refused when its polynomial is
    outside -3..3 on the whole domain (0 to 0.5 where none is known) and the reversed list comes back inside it there.

    Raises:
        EntryError: For such a list.
    """
    low, high = domain or (0.0, 0.5)
    grid = [low + (high - low) * step / 64 for step in range(65)]

    def plausible(coefficients: tuple[float, ...]) -> bool:
        raw = Polynomial(coefficients).raw
        return any(abs(raw(x)) <= 3 for x in grid)

    if not plausible(coefficients_high_to_low) and plausible(coefficients_high_to_low[::-1]):
        raise EntryError(
            f"predicts a change above 3 everywhere in {low:g} to {high:g}, but not when reversed: "
            "the list looks lowest power first; write it highest power first (numpy.polyfit's order)",
            ("coefficients_high_to_low",),
        )


def _check_control_value(coefficients: tuple[float, ...], stored: float) -> None:
    def differs(values: tuple[float, ...]) -> bool:
        size = sum(abs(value) * CONTROL_X**power for power, value in enumerate(reversed(values)))
        return abs(Polynomial(values).raw(CONTROL_X) - stored) > 1e-9 * size

    if differs(coefficients):
        why = "they are in reversed order" if not differs(coefficients[::-1]) else "one of the two was changed"
        found = Polynomial(coefficients).raw(CONTROL_X)
        raise EntryError(f"{stored!r}, but the coefficients give {found!r}: {why}; restore them", ("value_at_0p1",))


def _check_window(value: int | float | None, name: str) -> None:
    if isinstance(value, float) and not 0 <= value <= 1:
        raise EntryError(
            f"{value}: expected a fraction of the schedule from 0.0 to 1.0, or a whole number of steps", (name,)
        )
    if isinstance(value, int) and not 0 <= value <= 10_000:
        raise EntryError(f"{value}: expected 0 to 10000 steps, or a fraction from 0.0 to 1.0", (name,))


_ALWAYS_WRITTEN = ("schema", "version", "sign_rule")


def plain(record: Any) -> Any:
    """A record as plain dicts, lists and scalars; fields that hold their default are left out."""
    if isinstance(record, Record):
        return {
            spec.name: plain(value)
            for spec in dataclasses.fields(record)
            if (value := getattr(record, spec.name)) != _default(spec) or spec.name in _ALWAYS_WRITTEN
        }
    if isinstance(record, dict):
        return {key: plain(value) for key, value in record.items()}
    if isinstance(record, tuple | list):
        return [plain(value) for value in record]
    return record


def from_plain(data: Any, record: type[Record] = Entry) -> Any:
    """The record that plain data describes.

    Raises:
        EntryError: With the path of the first value that is unknown, missing, of a wrong type or out of range.
    """
    return _checker(record)(data)


def _default(spec: dataclasses.Field) -> Any:
    if spec.default_factory is not dataclasses.MISSING:
        return spec.default_factory()
    return spec.default


# --- checks compiled from the annotations ---------------------------------------------------------------------------

Check = Callable[[Any], Any]


@functools.cache
def _checker(annotation: Any) -> Check:
    """The function that checks and normalises a value of this annotation, raising ``EntryError``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Record):
        return functools.partial(_record, annotation)
    if origin is Annotated:
        return functools.partial(_constrained, _checker(arguments[0]), arguments[1])
    if origin is Literal:
        return functools.partial(_choice, arguments)
    if origin in (Union, types.UnionType):
        return _union_checker(arguments)
    if origin is dict:
        return functools.partial(_dict, _checker(arguments[0]), _checker(arguments[1]))
    if origin is tuple:
        length = None if arguments[-1] is Ellipsis else len(arguments)
        return functools.partial(_tuple, _checker(arguments[0]), length)
    return {str: _text, float: _number, int: _integer, bool: _boolean}[annotation]


def _record(cls: type[Record], value: Any) -> Record:
    if type(value) is cls:
        return value
    if not isinstance(value, dict):
        raise EntryError(f"{_found(value)}: expected a mapping of {', '.join(_names(cls)[:4])}, ...")
    for key in value:
        if key not in _names(cls):
            raise EntryError(f"unknown key: {_advice(key, cls)}", (str(key),))
    for spec in dataclasses.fields(cls):
        if spec.name not in value and _default(spec) is dataclasses.MISSING:
            raise EntryError(f"missing key {spec.name}")
    return cls(**{key: item for key, item in value.items() if item is not None or key in _required(cls)})


@functools.cache
def _names(cls: type[Record]) -> tuple[str, ...]:
    return tuple(spec.name for spec in dataclasses.fields(cls))


@functools.cache
def _required(cls: type[Record]) -> tuple[str, ...]:
    return tuple(spec.name for spec in dataclasses.fields(cls) if _default(spec) is dataclasses.MISSING)


def _advice(key: Any, cls: type[Record]) -> str:
    import difflib

    if "coefficients" in str(key):
        return "coefficients are given as coefficients_high_to_low, highest power first (numpy.polyfit's order)"
    close = difflib.get_close_matches(str(key), _names(cls), 1)
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(_names(cls))}"


def _constrained(check: Check, limits: Limits | Pattern, value: Any) -> Any:
    value = check(value)
    if isinstance(limits, Pattern):
        if not _compiled(limits.regex).fullmatch(value):
            raise EntryError(f"{_found(value)}: expected {limits.words}")
    elif not limits.low <= value <= limits.high:
        raise EntryError(f"{value}: expected {limits.low:g} to {limits.high:g}")
    return value


_compiled = functools.cache(re.compile)


def _choice(choices: tuple[str, ...], value: Any) -> str:
    if value not in choices or not isinstance(value, str):
        raise EntryError(f"{_found(value)}: expected {', '.join(choices)}")
    return value


def _union_checker(arguments: tuple) -> Check:
    nullable = type(None) in arguments
    checks = [_checker(argument) for argument in arguments if argument is not type(None)]
    if len(checks) == 1:
        check = checks[0]
        return lambda value: None if nullable and value is None else check(value)
    scalars = tuple(argument for argument in arguments if argument is not type(None))

    def one_of(value: Any) -> Any:
        if nullable and value is None:
            return None
        kind = next((kind for kind in (bool, int, float, str) if isinstance(value, kind)), None)
        if kind is int and int not in scalars and float in scalars:
            kind = float
        if kind not in scalars:
            raise EntryError(f"{_found(value)}: expected {' or '.join(_WORDS[kind] for kind in scalars)}")
        return _checker(kind)(value)

    return one_of


def _dict(check_key: Check, check: Check, value: Any) -> dict:
    if not isinstance(value, dict):
        raise EntryError(f"{_found(value)}: expected a mapping")
    items = {}
    for key, item in value.items():
        try:
            items[check_key(key)] = check(item)
        except EntryError as error:
            raise error.under(str(key)) from None
    return items


def _tuple(check: Check, length: int | None, value: Any) -> tuple:
    if not isinstance(value, list | tuple) and not hasattr(value, "tolist"):
        raise EntryError(f"{_found(value)}: expected a list")
    items = []
    for position, item in enumerate(value):
        try:
            items.append(check(item))
        except EntryError as error:
            raise error.under(position) from None
    if length is not None and len(items) != length:
        raise EntryError(f"{len(items)} values: expected {length}")
    return tuple(items)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise EntryError(f"{_found(value)}: expected text; put it in quotes")
    if len(value) > MAX_TEXT:
        raise EntryError(f"text of {len(value)} characters: expected at most {MAX_TEXT}")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise EntryError("text with a lone surrogate: expected valid Unicode")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        hint = number_hint(value) if isinstance(value, str) else ""
        raise EntryError(f"{_found(value)}: expected a number{hint}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= MAX_NUMBER:
        raise EntryError(f"{number}: expected a finite number of at most {MAX_NUMBER:g}")
    return number


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise EntryError(f"{_found(value)}: expected a whole number")
    if abs(value) > 2**53:
        raise EntryError("whole number beyond 2**53: expected one that every reader stores exactly")
    return int(value)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise EntryError(f"{_found(value)}: expected true or false")
    return value


_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def _found(value: Any) -> str:
    """Short words for a value in an error."""
    if value is None:
        return "nothing"
    if isinstance(value, dict | list | tuple):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = f"the text {value!r}" if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- JSON Schema ----------------------------------------------------------------------------------------------------


def json_schema() -> dict:
    """JSON Schema (2020-12) of an entry, for editors; ``schema.json`` holds exactly this."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Step-cache calibration entry",
        **_json_type(Entry),
        "$defs": {
            cls.__name__: _json_record(cls)
            for cls in (Checkpoint, Protocol, Counts, Candidate, Fit, Expert, Threshold, Plan, Source, Entry)
        },
    }


def _json_record(cls: type[Record]) -> dict:
    properties = {}
    for spec in dataclasses.fields(cls):
        described = _json_type(spec.type)
        if spec.name not in _required(cls) and not _json_nullable(described):
            described = _json_any([described, {"type": "null"}])
        properties[spec.name] = {"const": SCHEMA} if spec.name == "schema" else described
    return {
        "description": " ".join((cls.__doc__ or "").split("\n\n")[0].split()),
        "type": "object",
        "properties": properties,
        "required": [*(["schema"] if cls is Entry else []), *_required(cls)],
        "additionalProperties": False,
    }


def _json_any(kinds: Iterable[dict]) -> dict:
    kinds = list(kinds)
    if all(set(kind) == {"type"} for kind in kinds):
        return {"type": [kind["type"] for kind in kinds]}
    return {"anyOf": kinds}


def _json_nullable(kind: dict) -> bool:
    return {"type": "null"} in kind.get("anyOf", ()) or "null" in kind.get("type", ())


def _json_type(annotation: Any) -> dict:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Record):
        return {"$ref": f"#/$defs/{annotation.__name__}"}
    if origin is Annotated:
        limits = arguments[1]
        if isinstance(limits, Pattern):
            return {"type": "string", "pattern": f"^{limits.regex}$"}
        return {**_json_type(arguments[0]), "minimum": limits.low, "maximum": limits.high}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return _json_any(_json_type(argument) for argument in arguments)
    if origin is dict:
        return {"type": "object", "additionalProperties": _json_type(arguments[1])}
    if origin is tuple:
        fixed = {} if arguments[-1] is Ellipsis else {"minItems": len(arguments), "maxItems": len(arguments)}
        return {"type": "array", "items": _json_type(arguments[0]), **fixed}
    return {"type": {str: "string", float: "number", int: "integer", bool: "boolean", type(None): "null"}[annotation]}
