"""Everything that is known about a run, in the form that plots, report and notebooks draw. No plotting here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

import coeffs
from calibrate.errors import InvalidOption
from calibrate.fitting.held_out import learning_curve
from calibrate.fitting.intervals import bootstrap
from calibrate.fitting.replay import Search
from calibrate.model.table import EMBEDDED_MODEL
from calibrate.runs.pairs import Run, load_run
from calibrate.text import number
from calibrate.trials.measures import capped, main_measure
from calibrate.trials.setting import GATE, PLAN, SHOWN, branches_of
from calibrate.verifying.advice import Advice, advise
from calibrate.verifying.comparison import Comparison, judge
from calibrate.verifying.results import Verification, load_verification
from coeffs import Entry, Fit, Polynomial

CURVE_POINTS = 40
SHOWN_PROMPTS = (
    3  # whose images are in the page, of each policy: a 1024-pixel pair takes 3 MB
)
COINCIDE = 0.02  # of the range: curves of two branches that are nearer look like one
FIT_FIGURES = (
    *("r2", "r2_held_out", "rmse_held_out", "rmse_constant", "rmse_step_mean"),
    "spearman_within_step",
)


class Sample(NamedTuple):
    """An uncached and a cached image of one prompt, (height, width, 3) in [0, 1]; of a video the middle frame.

    Or series, (channels, values).
    """

    prompt: str
    uncached: np.ndarray
    cached: np.ndarray
    quality: float


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

    def pairs(self, expert: str = "transformer", branch: str | None = None) -> pd.DataFrame:
        """The usable pairs of an expert with the entry's signal and target as ``x`` and ``y``."""
        return self.run.pairs(self.entry.signal, self.entry.target, expert, branch)

    def fitted(self, expert: str = "transformer") -> dict[str, Fit]:
        """The fit that each of the run's branches is gated with."""
        return {name: self.entry.fit(expert, name) for name in self.run.branches(expert)}

    def fits(self, expert: str = "transformer") -> dict[str, Polynomial]:
        """The polynomials of these fits."""
        rule = self.entry.sign_rule
        return {name: fit.polynomial(rule) for name, fit in self.fitted(expert).items()}

    def bands(self, expert: str = "transformer") -> dict[str, pd.DataFrame]:
        """95 % interval of each branch's curve over its domain; none with fewer than three prompts."""
        bands = {}
        for name, fit in self.fitted(expert).items():
            if resampled := bootstrap(self.pairs(expert, name), fit):
                bands[name] = resampled.curve_band()
        return bands

    def learning(self, expert: str = "transformer") -> pd.DataFrame:
        """Held-out error over the number of prompts, per branch; empty with fewer than four prompts."""
        tables = []
        for name, fit in self.fitted(expert).items():
            table, _ = learning_curve(self.pairs(expert, name), fit.degree or 1, fit.method)
            tables.append(table.assign(branch=name))
        return pd.concat(tables, ignore_index=True)

    @cached_property
    def replayed(self) -> pd.DataFrame:
        """Computed steps and expected speed-up over the threshold, from the gate on the recorded signals."""
        search = Search(self.run, self.entry, branches_of(GATE, self.entry))
        counts = search.steps(search.grid).mean(axis=-1)
        # The stretch in which the number of computed steps changes, evenly spaced in threshold.
        few = max(counts.min() + 0.5, 0.2 * search.all_steps)
        last = search.grid[int(np.argmax(counts <= few))]
        return search.summary(np.linspace(0, last, CURVE_POINTS))

    def thresholds(self, kind: str) -> pd.DataFrame:
        """Rows of the entry's threshold table of one kind (``replay``, ``verified``, ``reported``)."""
        return pd.DataFrame([vars(row) for row in self.entry.thresholds if row.kind == kind])

    @property
    def results(self) -> pd.DataFrame:
        """Every verified run, one row each; ``quality`` is its main measure.

        Raises:
            InvalidOption: Where there is no verification.
        """
        if self.verification is None:
            raise InvalidOption(
                f"{self.folder}: not verified yet; run `calibrate verify {self.folder}` first"
            )
        results = self.verification.results
        return results.assign(quality=capped(results, main_measure(results)))

    def patterns(self) -> dict[str, str]:
        """Replayed and real patterns of the first held-out prompt, one pair of rows per budget of the fitted gate."""
        rows, patterns = self.results, {}
        of_gate = (rows["policy"] == GATE) & (rows["prompt_id"] == rows["prompt_id"].iloc[0])
        for row in rows[of_gate].drop_duplicates("budget").itertuples():
            for branch, foreseen in list(row.replayed.items())[:1]:
                patterns[f"{row.threshold:.3g} replayed"] = foreseen
                patterns[f"{row.threshold:.3g} real run"] = row.patterns[branch]
        return patterns

    def samples(self, policy: str = GATE, budget: int | None = None) -> list[Sample]:
        """Kept samples of a policy, the worst prompts first; those of the budget nearest to half of the steps."""
        rows = self.results
        if "sample" not in rows:  # sound is not kept
            return []
        rows = rows[rows["sample"].notna() & (rows["policy"] == policy)]
        budgets = sorted(rows["budget"].unique())
        if budget is None and budgets:
            budget = budgets[len(budgets) // 2]
        shown = rows[rows["budget"] == budget].sort_values("quality").head(SHOWN_PROMPTS)
        return [self._sample(row) for row in shown.itertuples()]

    def _sample(self, row: Any) -> Sample:
        folder = self.folder / "verify"
        with np.load(folder / "samples" / row.sample) as stored:
            cached = stored["image"].astype(np.float64)
        with np.load(folder / "reference" / row.reference) as stored:
            uncached = stored["media0"].astype(np.float64)
        if uncached.ndim == 4:
            uncached = uncached[len(uncached) // 2]
        return Sample(row.prompt, uncached, cached, row.quality)

    @property
    def plan_comparisons(self) -> list[Comparison]:
        """The plan against every other policy; nothing where no plan took part."""
        return judge(self.results, PLAN)

    @cached_property
    def advice(self) -> Advice | None:
        """What to deploy; None without a verification."""
        return None if self.verification is None else advise(self.results)

    def by_prompt(self) -> pd.DataFrame:
        """The main measure of every prompt (rows) under the main policies at the advised steps, the worst first."""
        if self.advice is None or self.advice.policy is None:
            return pd.DataFrame()
        rows = self.results[self.results["budget"] == self.advice.budget]
        table = rows.pivot_table("quality", "prompt", "policy", sort=False)
        shown = dict.fromkeys((self.advice.policy, *SHOWN))
        return table[[name for name in shown if name in table]].sort_values(
            self.advice.policy
        )

    def coinciding(self, column: str, expert: str = "transformer") -> str:
        """A sentence where the curves of all branches lie on each other, so that a plot shows one; else empty."""
        medians = self.pairs(expert).groupby(["sigma", "branch"])[column].median().unstack()
        apart = (medians.max(axis=1) - medians.min(axis=1)).max()
        if medians.shape[1] < 2 or apart > COINCIDE * np.ptp(medians.to_numpy()):
            return ""
        return f" {' and '.join(medians)} coincide: {medians.columns[-1]} is drawn over the others."

    def fit_headline(self, expert: str = "transformer") -> str:
        """What the fit is worth, in one sentence per branch: on unseen prompts, and against the schedule alone."""
        parts = []
        for name, fit in self.fitted(expert).items():
            figures = fit.figures or {}
            unseen, text = figures.get("r2_held_out"), "no prompt was held out"
            if unseen is not None:
                alone = number(figures.get("r2_step_mean"))
                text = (
                    f"R² {unseen:.2f} on unseen prompts, {alone} from the step number alone"
                )
            parts.append(f"{name}: {text}")
        return "; ".join(parts) + "."


def load_findings(folder: str | os.PathLike) -> Findings:
    """The findings of a run folder; it needs an ``entry.yaml``, and shows a verification where there is one.

    Raises:
        CalibrateError, CoeffsError: For a folder that is no run, or has not been fitted yet.
    """
    folder = Path(folder)
    run, path = load_run(folder), folder / "entry.yaml"
    if not path.exists():
        raise InvalidOption(
            f"{folder}: no entry.yaml in it yet; run `calibrate fit {folder}` first"
        )
    return Findings(run, coeffs.load(path), load_verification(folder), folder)


def figures_table(entry: Entry) -> pd.DataFrame:
    """One row per expert and branch of an entry: in-sample and held-out figures beside those of the rivals."""
    return pd.DataFrame([
        {
            "expert": expert,
            "branch": branch,
            "recommended": branch == known.recommended,
            "fit": fit.method,
            "pairs": fit.counts.pairs if fit.counts else None,
            **{name: (fit.figures or {}).get(name) for name in FIT_FIGURES},
        }
        for expert, known in entry.experts.items()
        for branch, fit in known.branches.items()
    ])  # fmt: skip


def example_run() -> Path:
    """A small recorded, fitted and verified run of the embedded model, for notebooks and for a first look."""
    return Path(__file__).parents[1] / "data" / "example-run"
