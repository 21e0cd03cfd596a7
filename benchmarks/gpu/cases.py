"""What is measured, the most worth knowing first, so that a run that is cut off still gives the important rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu import applying, compiling, planning, recording, whole
from benchmarks.workloads import load_workload, names


@dataclass(frozen=True)
class Case:
    """One row: a measurement on one model.

    Attributes:
        measure: From what ``load`` returns and a number of rounds to figures.
        load: From the model's name and whether it is of toy size to something with a title.
    """

    kind: str
    model: str
    measure: Callable[[Any, int], dict[str, Any]]
    load: Callable[[str, bool], Any] = load_workload

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.model}"

    def run(self, rounds: int, toy: bool) -> dict[str, Any]:
        """The row's title and figures."""
        subject = self.load(self.model, toy)
        return {"title": subject.title, "figures": self.measure(subject, rounds)}


def all_cases(toy: bool) -> list[Case]:
    """Applying and recording of every model, then the rest; planning last, whose models are trained first."""
    models = names(toy)
    found = []
    for model in models:
        found.append(Case("applying", model, applying.measure))
        found.append(Case("recording", model, recording.measure))
    found.append(Case("verify", models[0], whole.measure_verify))
    found.append(Case("measures", models[0], whole.measure_measures))
    found += [Case("compiling", model, compiling.measure) for model in models]
    if toy or torch.cuda.is_available():
        planned = [
            Case("planning", name, planning.measure, planning.Subject)
            for name in planning.KINDS
        ]
        found += planned
    return found
