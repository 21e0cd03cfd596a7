"""What each engine's release caches and compares (``releases.yaml``), and what of an entry it would misread."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from coeffs.entry.fields import Names, Record, Text, checked
from coeffs.entry.schema import Entry

Words = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Release(Record):
    """One form of one engine's release; the head of ``releases.yaml`` explains the fields."""

    release: str
    read_from: Names
    signals: Words = field(default_factory=dict)
    classes: Names = ()
    unsupported: Words = field(default_factory=dict)
    sign_rule: Literal["clamp", "signed", "abs"] | None = None
    exactly: int | None = None
    windows: dict[str, tuple[int, int]] = field(default_factory=dict)
    experts: int = 1
    forecast: int = 0
    calls: Literal["apart", "set", "default", "one"]
    asked: Names = ()
    two_calls: Names = ()
    quality: Words = field(default_factory=dict)
    keys: Names

    @property
    def version(self) -> str:
        return self.release.split()[-1]

    @property
    def known(self) -> Names:
        """The classes that it caches; empty where it takes any."""
        return self.classes or tuple(self.signals)


@functools.cache
def releases() -> dict[str, Release]:
    """Engine -> what its release can do."""
    import yaml  # here, so that `import coeffs` stays cheap

    table = yaml.safe_load(Path(__file__).with_name("releases.yaml").read_bytes())
    return {engine: checked(Release, facts) for engine, facts in table.items()}


def plan_forms() -> list[str]:
    """Forms that take a plan."""
    return [engine for engine, release in releases().items() if not release.signals]


def takers(choice: str) -> list[str]:
    """Forms that an option of ``calibrate export`` changes."""
    if choice == "schedule":
        return [*plan_forms(), "solver"]
    of_plans = plan_forms() if choice == "threshold" else []
    return [engine for engine in releases() if engine not in of_plans]


def misfits(engine: str, entry: Entry) -> list[str]:
    """What the engine would ignore, misread or crash on in an entry's model; each with what to do."""
    release = releases()[engine]
    name = entry.transformer_class or "a class that the entry does not state"
    why = release.unsupported.get(entry.model) or release.unsupported.get(name)
    problem = None
    if why:
        problem = f"which {release.release} cannot cache: {why}"
    elif release.known and name not in release.known:
        known = ", ".join(release.known[:6]) + (", ..." if len(release.known) > 6 else "")
        problem = f"{release.release} has code for {known} only"
    if problem:
        return [f"{entry.label} is for {name}, {problem}{_instead(engine, name)}"]
    return [*_signal(engine, entry, release.signals.get(name)), *_calls(entry, release)]


def two_calls(entry: Entry) -> bool | None:
    """Whether guidance calls the denoiser twice a step; None where nothing in the entry tells."""
    branches: set[str] = set()
    for expert in entry.experts.values():
        branches |= {*expert.branches, *(expert.mag_ratios or {})}
    branches.discard("pooled")
    if branches:
        return len(branches) > 1
    scale = entry.protocol.call_arguments.get("true_cfg_scale")
    return scale > 1 if isinstance(scale, int | float) else None


def projected(entry: Entry) -> bool:
    """Whether the time embedding of the fit is the projected one (Wan's ``use_ret_steps``)."""
    return "projected" in (entry.signal_note or "")


def _instead(engine: str, name: str) -> str:
    """Other forms of the same kind that take the class."""
    of_plans = plan_forms()
    others = [
        other
        for other, release in releases().items()
        if other != engine
        and name in release.known
        and (other in of_plans) == (engine in of_plans)
    ]
    return f"; export it to {' or '.join(others)}" if others else ""


def _signal(engine: str, entry: Entry, compared: Text) -> Iterator[str]:
    # "other" names no signal: only the engine that published the set compares the same one.
    same = entry.signal == compared and (compared != "other" or entry.engine == engine)
    if compared is None or same or entry.signal == "none":
        return
    said = f"the {compared} there: fit the run again with `calibrate fit RUN --signal {compared}`"
    if compared == "other":
        said = (
            f"a signal of its own for {entry.transformer_class}: take that engine's own set"
        )
    yield f"{entry.label} was fitted on the {entry.signal}, {engine} compares {said}"


def _calls(entry: Entry, release: Release) -> Iterator[str]:
    two, said = two_calls(entry), ""
    if release.calls == "one" and two:
        said = "keeps one state for both: run the branches in one batch"
    elif release.calls == "default" and entry.transformer_class not in release.asked:
        expected = entry.transformer_class in release.two_calls
        if two not in (None, expected):
            number = "two" if expected else "one"
            said = f"expects {number} for this class and has no setting for it"
    if said:
        calls = "two calls" if two else "one call"
        yield f"{entry.label} has {calls} of the denoiser a step, {release.release} {said}"
