"""Entries in the forms that engines take, and back. ``ENGINES`` lists them; each module has its engine's rules."""

from dataclasses import replace
from importlib import import_module
from types import ModuleType

from coeffs.engines.setting import Carried, Request, stripped
from coeffs.entry.schema import Entry, Expert, Fit, Plan, Source, Threshold
from coeffs.errors import EngineError

ENGINES = {
    "vllm-omni": "vllm_omni",
    "sglang": "sglang",
    "tensorrt-llm": "tensorrt_llm",
    "lightx2v": "lightx2v",
    "comfyui-teacache": "comfyui_teacache",
    "diffusers-magcache": "diffusers_magcache",
    "cache-dit-mask": "cache_dit_mask",
    "json": "json_entry",
}


def export_entry(
    entry: Entry, engine: str, *, threshold: float | None = None, schedule: str | None = None
) -> str:
    """An entry in the form that ``engine`` takes, with a comment that names it.

    Args:
        threshold: The one that travels with the coefficients; needed unless the entry has exactly one.
        schedule: A fixed plan for ``cache-dit-mask``, one letter per step; needed unless the entry has exactly one.

    Raises:
        EngineError: What the engine cannot express, and what to do instead.
    """
    return _module(engine).write(Request(entry=entry, threshold=threshold, schedule=schedule))


def import_entry(text: str, engine: str, *, like: Entry | None = None, **facts: object) -> Entry:
    """A draft entry from an engine's form.

    Args:
        like: An entry whose facts are kept; what the form carries replaces its numbers where they differ.
        facts: Fields of a new entry where there is no ``like``: at least ``model`` and ``signal``, as far as the form
            does not say.

    Raises:
        EngineError: The text is not the engine's form, or facts are missing.
        EntryError: Numbers that make no valid entry, such as a list in reversed order.
    """
    carried = _module(engine).read(text)
    if carried.entry is not None:
        return carried.entry
    if like is not None:
        return _onto(like, carried)
    facts = {
        "signal": carried.signal or "other",
        "status": "published",
        "target": "unknown",
        "engine": engine,
    } | facts
    if not facts.get("model"):
        raise EngineError(f"{engine} does not say which model this is: give --model")
    names = dict.fromkeys([*(carried.coefficients or ()), *(carried.mag_ratios or ())]) or {
        "transformer": None
    }
    return Entry(
        **facts,
        sign_rule=carried.sign_rule or "clamp",
        experts={name: _expert(Expert(), name, carried) for name in names},
        thresholds=()
        if carried.threshold is None
        else (Threshold(threshold=carried.threshold, kind="reported"),),
        start=carried.start,
        end=carried.end,
        max_skips=carried.max_skips,
        plans=None if carried.schedule is None else (Plan(schedule=carried.schedule),),
        source=Source(reference=f"imported from {engine}'s form"),
    )


def _onto(entry: Entry, carried: Carried) -> Entry:
    names = dict.fromkeys(
        [*entry.experts, *(carried.coefficients or ()), *(carried.mag_ratios or ())]
    )
    changed: dict = {
        "experts": {
            name: _expert(entry.experts.get(name, Expert()), name, carried) for name in names
        }
    }
    if carried.threshold is not None and carried.threshold not in {
        row.threshold for row in entry.thresholds
    }:
        changed["thresholds"] = (Threshold(threshold=carried.threshold, kind="reported"),)
    if carried.schedule is not None and carried.schedule not in {
        plan.schedule for plan in entry.plans or ()
    }:
        changed["plans"] = (*(entry.plans or ()), Plan(schedule=carried.schedule))
    changed |= {
        name: value
        for name in ("start", "end", "max_skips")
        if (value := getattr(carried, name)) is not None
    }
    return replace(entry, **changed)


def _expert(expert: Expert, name: str, carried: Carried) -> Expert:
    """The expert with the carried numbers; a polynomial that it already recommends keeps its facts."""
    changed: dict = {}
    coefficients = (carried.coefficients or {}).get(name)
    if coefficients is not None:
        known = expert.branches.get(expert.recommended or "")
        if known is None or stripped(known.coefficients_high_to_low) != stripped(coefficients):
            fit = Fit(coefficients_high_to_low=coefficients, method="published")
            changed |= {"branches": {"pooled": fit}, "recommended": "pooled"}
    ratios = (carried.mag_ratios or {}).get(name)
    if ratios is not None and ratios not in (expert.mag_ratios or {}).values():
        changed["mag_ratios"] = {"pooled": ratios}
    return replace(expert, **changed)


def _module(engine: str) -> ModuleType:
    if engine not in ENGINES:
        raise EngineError(f"engine {engine!r}: expected one of {', '.join(ENGINES)}")
    return import_module(f"coeffs.engines.{ENGINES[engine]}")
