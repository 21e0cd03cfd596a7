"""What is measured, the most worth knowing first, so that a run that is cut off still gives the important rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu import applying, compiling, recording, whole
from benchmarks.workloads import Workload, load_workload, names


@dataclass(frozen=True)
class Case:
    """One row: a measurement on one model."""

    kind: str
    model: str
    measure: Callable[[Workload, int], dict[str, Any]]

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.model}"

    def run(self, rounds: int, toy: bool) -> dict[str, Any]:
        """The row's title and figures."""
        workload = load_workload(self.model, toy)
        return {"title": workload.title, "figures": self.measure(workload, rounds)}


def all_cases(toy: bool) -> list[Case]:
    """Applying and recording of every model, then the rest."""
    models = names(toy)
    found = []
    for model in models:
        found.append(Case("applying", model, applying.measure))
        found.append(Case("recording", model, recording.measure))
    found.append(Case("verify", models[0], whole.measure_verify))
    found.append(Case("measures", models[0], whole.measure_measures))
    found += [Case("compiling", model, compiling.measure) for model in models]
    return found
