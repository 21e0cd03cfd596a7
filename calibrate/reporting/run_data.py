"""Everything that is known about a run, in the form that plots, report and notebooks draw. No plotting here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd

import coeffs
from calibrate.errors import InvalidOption
from calibrate.fitting.held_out import learning_curve
from calibrate.fitting.intervals import bootstrap
from calibrate.fitting.least_squares import FitResult
from calibrate.fitting.replay import Search, polynomials, replay, summarise
from calibrate.runs.pairs import Run, load_run
from calibrate.trials.setting import GATE, branches_of, gate_config
from calibrate.verifying.comparison import Comparison, first_lines, judge_plan
from calibrate.verifying.results import Verification, load_verification
from coeffs import Entry, Fit, Polynomial

EMBEDDED_MODEL = "tiny-longcat-image"
CURVE_POINTS = 40


@dataclass(frozen=True)
class Findings:
    """A run, its entry, and its verification where there is one."""

    run: Run
    entry: Entry
    verification: Verification | None
    folder: Path

    @property
    def embedded(self) -> bool:
        return EMBEDDED_MODEL in (self.run.manifest.get("model"), self.entry.model)

    def pairs(self, expert: str = "transformer") -> pd.DataFrame:
        """The usable pairs of an expert with the entry's signal and target as ``x`` and ``y``."""
        return self.run.pairs(self.entry.signal, self.entry.target, expert)

    def fits(self, expert: str = "transformer") -> dict[str, Polynomial]:
        """The polynomial of every branch of the entry, in the order of the run's branches."""
        known = self.entry.experts[expert].branches
        order = [*self.run.branches(expert), "pooled"]
        return {
            name: known[name].polynomial(self.entry.sign_rule) for name in order if name in known
        }

    def bands(self, expert: str = "transformer") -> dict[str, pd.DataFrame]:
        """95 % interval of each branch's curve over its domain; none with fewer than three prompts."""
        found = {}
        for name, fit in self.entry.experts[expert].branches.items():
            resampled = (
                None if fit.domain is None else bootstrap(self._of(expert, name), _result(fit))
            )
            if resampled is not None:
                found[name] = resampled.curve_band()
        return found

    def learning(self, expert: str = "transformer") -> pd.DataFrame:
        """Held-out error over the number of prompts, per branch; empty with fewer than four prompts."""
        tables = []
        for name in self.run.branches(expert):
            fit = self.entry.fit(expert, name)
            method = fit.method if fit.method != "published" else "polyfit"
            table, _ = learning_curve(self._of(expert, name), max(fit.degree, 1), method)
            tables.append(table.assign(branch=name))
        return pd.concat(tables, ignore_index=True)

    @cached_property
    def replayed(self) -> pd.DataFrame:
        """Computed steps and expected speed-up over the threshold, from the gate on the recorded signals."""
        of_branch, mode = polynomials(self.entry, self.run), branches_of(GATE, self.entry)
        driving = gate_config(self.entry), self.entry.signal, mode
        search = Search(self.run, of_branch, *driving)
        counts = search.generation_means(search.computed(search.grid))
        # The stretch in which the number of computed steps changes, evenly spaced in threshold.
        few = max(counts.min() + 0.5, 0.2 * search.num_steps)
        useful = search.grid[: int(np.argmax(counts <= few)) + 1]
        thresholds = list(np.linspace(0, useful[-1], CURVE_POINTS))
        return summarise(replay(self.run, of_branch, thresholds, *driving), self.run.timing)

    def thresholds(self, kind: str = "verified") -> pd.DataFrame:
        """Rows of the entry's threshold table of one kind (``replay``, ``verified``, ``reported``)."""
        rows = [row for row in self.entry.thresholds if row.kind == kind]
        return pd.DataFrame(
            [{name: getattr(row, name) for name in row.__dataclass_fields__} for row in rows]
        )

    def patterns(self, branch: str | None = None) -> dict[str, str]:
        """Replayed and real patterns of the first held-out prompt, one pair of rows per budget of the fitted gate."""
        if self.verification is None:
            return {}
        rows = self.verification.results
        rows = rows[(rows["policy"] == GATE) & (rows["prompt_id"] == rows["prompt_id"].iloc[0])]
        found = {}
        for row in rows.drop_duplicates("budget").itertuples():
            name = next(
                (key for key in row.patterns if branch in (None, key.partition("/")[2])), None
            )
            if name in (row.replayed or {}):
                found[f"{row.threshold:.3g} replayed"] = row.replayed[name]
                found[f"{row.threshold:.3g} real run"] = row.patterns[name]
        return found

    def samples(
        self, budget: int | None = None, count: int = 3
    ) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """``(prompt, uncached, cached)`` of the fitted gate at a budget (default: the middle one)."""
        if self.verification is None or "sample" not in self.verification.results:
            return []
        rows = self.verification.results
        rows = rows[rows["sample"].notna() & (rows["policy"] == GATE)]
        if rows.empty:
            return []
        budgets = sorted(rows["budget"].unique())
        rows = rows[
            rows["budget"] == (budget if budget is not None else budgets[len(budgets) // 2])
        ]
        found = []
        for row in rows.head(count).itertuples():
            with np.load(self.verification.folder / "samples" / row.sample) as stored:
                cached = stored["image"].astype(np.float64)
            with np.load(self.verification.folder / "reference" / row.reference) as stored:
                uncached = stored["media0"].astype(np.float64)
            if uncached.ndim == 4:
                uncached = uncached[len(uncached) // 2]
            found.append((row.prompt, uncached, cached))
        return found

    @property
    def comparisons(self) -> list[Comparison]:
        """The fitted gate against every other policy."""
        return [] if self.verification is None else self.verification.comparisons

    @cached_property
    def plan_comparisons(self) -> list[Comparison]:
        """The plan against every other policy; nothing where no plan took part."""
        return [] if self.verification is None else judge_plan(self.verification.results)

    @cached_property
    def first_lines(self) -> list[str]:
        """What the verification found, in words, worst news first; nothing without one."""
        return (
            []
            if self.verification is None
            else first_lines(self.verification.results, self.verification.headline)
        )

    def fit_headline(self, expert: str = "transformer") -> str:
        """What the fit is worth, in one sentence per branch: on unseen prompts, and against the schedule alone."""
        parts = []
        for name in self.run.branches(expert):
            figures: Mapping = self.entry.fit(expert, name).figures or {}
            unseen, alone = figures.get("r2_held_out"), figures.get("r2_step_mean")
            if unseen is None:
                parts.append(
                    f"{name}: R² {_number(figures.get('r2'))} on its own prompts (none held out)"
                )
            elif alone is None:
                parts.append(f"{name}: R² {unseen:.2f} on unseen prompts")
            else:
                word = (
                    "less than"
                    if unseen < alone - 0.01
                    else "more than"
                    if unseen > alone + 0.01
                    else "as much as"
                )
                parts.append(
                    f"{name}: R² {unseen:.2f} on unseen prompts, {word} the step number alone tells ({alone:.2f})"
                )
        return "; ".join(parts) + "."

    def _of(self, expert: str, branch: str) -> pd.DataFrame:
        return self.run.pairs(self.entry.signal, self.entry.target, expert, branch)


def load_findings(folder: str | os.PathLike) -> Findings:
    """The findings of a run folder; it needs an ``entry.yaml``, and shows a verification where there is one.

    Raises:
        CalibrateError, CoeffsError: For a folder that is no run, or has not been fitted yet.
    """
    folder = Path(folder)
    run = load_run(folder)
    if not (folder / "entry.yaml").exists():
        raise InvalidOption(
            f"{folder}: no entry.yaml in it yet; run `calibrate fit {folder}` first"
        )
    entry = coeffs.load(folder / "entry.yaml")
    return Findings(run, entry, load_verification(folder), folder)


def figures_table(entry: Entry) -> pd.DataFrame:
    """One row per expert and branch of an entry: in-sample and held-out figures beside those of the rivals."""
    names = (
        "r2",
        "r2_held_out",
        "rmse_held_out",
        "rmse_constant",
        "rmse_step_mean",
        "spearman_within_step",
    )
    rows = [
        {
            "expert": expert,
            "branch": branch,
            "recommended": branch == known.recommended,
            "fit": fit.method,
            "pairs": fit.counts.pairs if fit.counts else None,
            **{name: (fit.figures or {}).get(name) for name in names},
        }
        for expert, known in entry.experts.items()
        for branch, fit in known.branches.items()
    ]
    return pd.DataFrame(rows)


def example_run() -> Path:
    """A small recorded, fitted and verified run of the embedded model, for notebooks and for a first look."""
    return Path(str(files("calibrate") / "data" / "example-run"))


def _result(fit: Fit) -> FitResult:
    lowered = next(
        (i for i, value in enumerate(fit.coefficients_high_to_low[:-1]) if value), fit.degree
    )
    return FitResult(fit.coefficients_high_to_low, fit.method, fit.domain, float("nan"), lowered)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"
