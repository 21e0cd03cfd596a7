"""A plan run by an engine's own code on the real pipeline, from the form that users of the engine get."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import yaml

from calibrate.errors import InvalidOption
from calibrate.model.session import Session
from calibrate.trials.rivals import cache_taken_off, counted, diffusers_cache, refusing
from calibrate.trials.setting import Patterns, PatternsOf, Setting, plans_of
from coeffs import Entry, Plan
from coeffs.engines import export_entry
from coeffs.engines.text import read_calls
from coeffs.errors import CheckFailed

KIND = "through"


def through_setting(policy: str, engine: str, entry: Entry, plan: Plan) -> Setting:
    """A plan as ``engine`` runs it.

    Raises:
        InvalidOption, EngineError: The engine is not installed, or cannot run the plan.
    """
    if engine == "cache-dit" and find_spec("cache_dit") is None:
        raise InvalidOption("cache-dit is not installed: pip install 'teacal[cache-dit]'")
    text = export_entry(entry, ENGINES[engine][0], schedule=plan.schedule)
    options = {"engine": engine, "form": text}
    return Setting(policy, KIND, plan.schedule.count("C"), plan=plan, options=options)


def check_through(engine: str, entry: Entry, num_steps: int) -> list[Plan]:
    """The entry's plans for this number of steps, all of which the engine can run.

    Raises:
        InvalidOption, EngineError: The engine is not installed, there is no such plan, or it cannot run one.
    """
    plans = plans_of(entry, num_steps)
    if not plans:
        raise InvalidOption(
            f"--through: {entry.label} has no plan of {num_steps} steps; make some with `calibrate plan`"
        )
    for plan in plans:
        through_setting(engine, engine, entry, plan)
    return plans


@contextmanager
def run_through(session: Session, setting: Setting) -> Iterator[PatternsOf]:
    """Have the engine run the setting's form; the function that is yielded checks the executed patterns.

    Raises:
        Refused: The engine fails on the model.
        CheckFailed: It executed something else than was exported.
    """
    engine, text = setting.options["engine"], setting.options["form"]
    assert setting.plan is not None
    exported, (_, applied) = setting.plan.schedule, ENGINES[engine]
    # Counted from before: an engine may put its own modules around the blocks.
    with counted(session.modules) as patterns_of:

        def executed() -> Patterns:
            patterns = patterns_of()
            for branch, pattern in patterns.items():
                if pattern != exported:
                    raise CheckFailed(
                        f"{engine} executed {pattern} in {branch}, exported was {exported}: do not use "
                        "the export there"
                    )
            return patterns

        with cache_taken_off(session.modules), applied(session, text):
            yield executed


@contextmanager
def _cache_dit(session: Session, text: str) -> Iterator[None]:
    # It logs several lines for every generation; read when it is imported.
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    import cache_dit

    loaded = cache_dit.load_configs(yaml.safe_load(text))
    configs = {name: loaded[name] for name in ("cache_config", "calibrator_config")}
    with refusing("cache-dit"):
        cache_dit.enable_cache(session.pipeline, **configs)
    try:
        yield
    finally:
        cache_dit.disable_cache(session.pipeline)


@contextmanager
def _mag_cache(session: Session, text: str) -> Iterator[None]:
    ((_, arguments),) = read_calls(text, "MagCacheConfig")
    with diffusers_cache(session.modules, "MagCache", arguments):
        yield


# Engine -> what `calibrate export --to` calls its form of a plan, and what has its code run the exported text.
ENGINES = {
    "cache-dit": ("cache-dit-mask", _cache_dit),
    "diffusers-magcache": ("diffusers-magcache", _mag_cache),
}
