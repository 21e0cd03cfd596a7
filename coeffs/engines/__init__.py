"""Entries in the forms that engines take, and back. ``ENGINES`` lists them; each module has its engine's rules."""

from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any

from coeffs.engines.setting import Carried, Request, stripped
from coeffs.engines.text import Form
from coeffs.entry.provenance import Source
from coeffs.entry.schema import Entry, Expert, Fit
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
    "solver": "solver",
    "json": "json_entry",
}


def export_entry(entry: Entry, engine: str, **choices: Any) -> str:
    """An entry in the form that ``engine`` takes, with a comment that names it.

    Args:
        choices: Further fields of ``coeffs.engines.setting.Request``.

    Raises:
        EngineError: What the engine cannot express, ignores or misreads, and what to do instead.
    """
    text: str = _module(engine).write(Request(entry=entry, engine=engine, **choices))
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
        known = vars(like)
    elif facts.get("model"):
        known = {
            "signal": carried.signal or "other",
            "status": "published",
            "target": "unknown",
            "engine": engine,
            "sign_rule": carried.sign_rule or "clamp",
            "source": Source(reference=f"imported from {engine}'s form"),
            **facts,
        }
    else:
        raise EngineError(f"{engine} does not say which model this is: give --model")
    return Entry(**known | _changes(carried, known))


def _changes(carried: Carried, known: Form) -> Form:
    """The fields of an entry that a form's numbers change; what it already recommends or holds keeps its facts."""
    experts = {**known.get("experts", {})}
    for name, numbers in carried.coefficients.items():
        expert, coefficients = experts.get(name, Expert()), stripped(numbers)
        used = expert.branches.get(expert.recommended or "")
        if used is None or stripped(used.coefficients_high_to_low) != coefficients:
            fit = Fit(coefficients_high_to_low=coefficients, method="published")
            experts[name] = replace(expert, branches={"pooled": fit}, recommended="pooled")
    for name, ratios in carried.mag_ratios.items():
        expert = experts.get(name, Expert())
        held = (expert.mag_ratios or {}).values()
        if any(values not in held for values in ratios.values()):
            experts[name] = replace(expert, mag_ratios=ratios)
    changed: Form = {"experts": experts or {"transformer": Expert()}}
    threshold, schedule = carried.threshold, carried.schedule
    if threshold not in (None, *(row.threshold for row in known.get("thresholds", ()))):
        changed["thresholds"] = ({"threshold": threshold, "kind": "reported"},)
    plans = known.get("plans") or ()
    if schedule not in (None, *(plan.schedule for plan in plans)):
        changed["plans"] = (*plans, {"schedule": schedule})
    for name in ("start", "end", "max_skips"):
        if getattr(carried, name) is not None:
            changed[name] = getattr(carried, name)
    return changed


def _module(engine: str) -> ModuleType:
    if engine not in ENGINES:
        raise EngineError(f"engine {engine!r}: expected one of {', '.join(ENGINES)}")
    return import_module(f"coeffs.engines.{ENGINES[engine]}")
