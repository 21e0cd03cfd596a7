"""Shared set-up: one thread, no network, no user registry, so that a test sees the same world everywhere."""

import gc
import os
from pathlib import Path

import pytest

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    DIFFUSERS_VERBOSITY="error",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    OMP_WAIT_POLICY="PASSIVE",
)


def pytest_collection_finish() -> None:
    """What is loaded by now stays: the collector of garbage need not go through all of torch again and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Every worker begins with modules that hold slow tests, and ends with quick tests that others can take over.

    xdist deals equal parts of this order and moves tests from the end of a part. A module with slow tests stays
    with one worker, so that its fixtures are made once.
    """
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers == 1:
        return
    modules: dict[Path, list[pytest.Item]] = {}
    for item in items:
        modules.setdefault(item.path, []).append(item)
    slow = [tests for tests in modules.values() if any(map(is_slow, tests))]
    quick = [item for tests in modules.values() if tests not in slow for item in tests]
    ordered: list[pytest.Item] = []
    for worker in range(workers):
        part = [item for tests in slow[worker::workers] for item in tests]
        room = max(0, (len(items) - len(ordered)) // (workers - worker) - len(part))
        ordered += part + quick[:room]
        del quick[:room]
    items[:] = ordered + quick


def is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None
