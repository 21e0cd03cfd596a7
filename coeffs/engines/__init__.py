"""Entries in the forms that engines take, and back. ``ENGINES`` lists them; each module has its engine's rules."""

from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any

from coeffs.engines.setting import Carried, Request, stripped
from coeffs.entry.provenance import Source
from coeffs.entry.schema import Entry, Expert, Fit, Plan, Threshold
from coeffs.errors import EngineError

ENGINES = {
    "vllm-omni": "vllm_omni",
    "vllm-omni-magcache": "vllm_omni_magcache",
    "sglang": "sglang",
    "sglang-cache-dit": "sglang_cache_dit",
    "tensorrt-llm": "tensorrt_llm",
    "lightx2v": "lightx2v",
    "lightx2v-magcache": "lightx2v_magcache",
    "comfyui-teacache": "comfyui_teacache",
    "mlx-teacache": "mlx_teacache",
    "diffusers-magcache": "diffusers_magcache",
    "cache-dit-mask": "cache_dit_mask",
    "xfuser": "xfuser",
    "angelslim": "angelslim",
    "json": "json_entry",
}


def export_entry(
    entry: Entry,
    engine: str,
    *,
    threshold: float | None = None,
    schedule: str | None = None,
    release: str | None = None,
    force: bool = False,
) -> str:
    """An entry in the form that ``engine`` takes, with a comment that names it.

    Args:
        threshold: The one that travels with the coefficients; needed unless the entry has exactly one.
        schedule: A plan, one letter per step; needed for engines of plans unless the entry has exactly one.
        release: The engine's version; refused unless it is the one that our facts were read from.
        force: Write also what the engine would ignore or misread, with the warning inside.

    Raises:
        EngineError: What the engine cannot express, ignores or misreads, and what to do instead.
    """
    request = Request(
        entry=entry, threshold=threshold, schedule=schedule, release=release, force=force
    )
    text: str = _module(engine).write(request)
    return text


def import_entry(text: str, engine: str, *, like: Entry | None = None, **facts: Any) -> Entry:
    """A draft entry from an engine's form.

    Args:
        like: An entry whose facts are kept; what the form carries replaces its numbers where they differ.
        facts: Fields of a new entry where there is no ``like``: at least ``model`` and ``signal``, as far as the form
            does not say.

    Raises:
        EngineError: The text is not the engine's form, or facts are missing.
        EntryError: Numbers that make no valid entry, such as a list in reversed order.
    """
    carried: Carried = _module(engine).read(text)
    if carried.entry is not None:
        return carried.entry
    if like is not None:
        return replace(like, **_changes(carried, like.experts, like.thresholds, like.plans or ()))
    if not facts.get("model"):
        raise EngineError(f"{engine} does not say which model this is: give --model")
    known: dict[str, Any] = {
        "signal": carried.signal or "other",
        "status": "published",
        "target": "unknown",
        "engine": engine,
        "sign_rule": carried.sign_rule or "clamp",
        "source": Source(reference=f"imported from {engine}'s form"),
    }
    return Entry(**known | facts, **_changes(carried, {}, (), ()))


def _changes(
    carried: Carried,
    experts: dict[str, Expert],
    thresholds: tuple[Threshold, ...],
    plans: tuple[Plan, ...],
) -> dict[str, Any]:
    """The fields of an entry that a form's numbers change."""
    names = dict.fromkeys([*experts, *(carried.coefficients or ()), *(carried.mag_ratios or ())])
    names = names or {"transformer": None}
    changed: dict[str, Any] = {
        "experts": {name: _expert(experts.get(name, Expert()), name, carried) for name in names}
    }
    known = {row.threshold for row in thresholds}
    if carried.threshold is not None and carried.threshold not in known:
        changed["thresholds"] = (Threshold(threshold=carried.threshold, kind="reported"),)
    schedules = {plan.schedule for plan in plans}
    if carried.schedule is not None and carried.schedule not in schedules:
        changed["plans"] = (*plans, Plan(schedule=carried.schedule))
    for name in ("start", "end", "max_skips"):
        if getattr(carried, name) is not None:
            changed[name] = getattr(carried, name)
    return changed


def _expert(expert: Expert, name: str, carried: Carried) -> Expert:
    """The expert with the carried numbers; a polynomial that it already recommends keeps its facts."""
    changed: dict[str, Any] = {}
    coefficients = (carried.coefficients or {}).get(name)
    if coefficients is not None:
        known = expert.branches.get(expert.recommended or "")
        if known is None or stripped(known.coefficients_high_to_low) != stripped(coefficients):
            fit = Fit(coefficients_high_to_low=coefficients, method="published")
            changed |= {"branches": {"pooled": fit}, "recommended": "pooled"}
    ratios = (carried.mag_ratios or {}).get(name)
    known_ratios = (expert.mag_ratios or {}).values()
    if ratios is not None and not all(values in known_ratios for values in ratios.values()):
        changed["mag_ratios"] = ratios
    return replace(expert, **changed)


def _module(engine: str) -> ModuleType:
    if engine not in ENGINES:
        raise EngineError(f"engine {engine!r}: expected one of {', '.join(ENGINES)}")
    return import_module(f"coeffs.engines.{ENGINES[engine]}")
