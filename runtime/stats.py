"""What the runtime did: patterns, reasons, counts. Pure and bounded: one record per branch, never per step."""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field

from runtime.decide.gate import Decision


@dataclass
class BranchStats:
    """The latest generation of one branch of one expert.

    Attributes:
        pattern: One letter per denoising step, ``C`` computed and ``S`` skipped.
        reasons: How often each kind of decision was taken.
        last_x: Relative L1 change of the signal at the last step where it was measured.
    """

    pattern: str = ""
    reasons: Counter = field(default_factory=Counter)
    last_x: float | None = None

    @property
    def computed(self) -> int:
        return self.pattern.count("C")

    @property
    def skipped(self) -> int:
        return self.pattern.count("S")


@dataclass
class Stats:
    """Statistics of an applied cache.

    Attributes:
        branches: ``(expert, branch) -> BranchStats`` of the latest generation.
        totals: Decisions by kind since the cache was applied, over all generations.
        generations: Generations begun since the cache was applied.
    """

    branches: dict[tuple[str, str], BranchStats] = field(default_factory=dict)
    totals: Counter = field(default_factory=Counter)
    generations: int = 0
    _schedule: Hashable | None = field(default=None, repr=False)

    @property
    def computed(self) -> int:
        """Stack computations in the latest generation, over all branches and experts."""
        return sum(branch.computed for branch in self.branches.values())

    @property
    def skipped(self) -> int:
        """Stack computations saved in the latest generation."""
        return sum(branch.skipped for branch in self.branches.values())

    @property
    def pattern(self) -> str:
        """Pattern of the first branch of the latest generation, one expert after the other."""
        names = [branch for _, branch in self.branches]
        return "".join(
            stats.pattern
            for (_, branch), stats in self.branches.items()
            if branch == names[0]
        )

    def begin(self, expert: str, schedule: Hashable | None = None) -> bool:
        """``expert`` begins a generation; whether it only joins one that another began on the same schedule."""
        took_part = expert in (name for name, _ in self.branches)
        if schedule is not None and schedule == self._schedule and not took_part:
            return True
        self._schedule = schedule
        self.generations += 1
        self.branches = {}
        return False

    def add(self, expert: str, branch: str, decision: Decision) -> None:
        stats = self.branches.setdefault((expert, branch), BranchStats())
        stats.pattern += "S" if decision.skip else "C"
        stats.reasons[decision.kind] += 1
        stats.last_x = stats.last_x if decision.x is None else decision.x
        self.totals[decision.kind] += 1

    def __str__(self) -> str:
        lines = [f"{self.computed} computed, {self.skipped} skipped"]
        for (expert, branch), stats in self.branches.items():
            reasons = ", ".join(
                f"{kind} {count}" for kind, count in sorted(stats.reasons.items())
            )
            lines.append(f"{expert}/{branch}: {stats.pattern} ({reasons})")
        return "\n".join(lines)
