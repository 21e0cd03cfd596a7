"""Verification: real cached runs against uncached ones, with the same seeds, on prompts that were never fitted.

Everything under ``verify/`` is resumable: a result is one line, named by the hash of all that it depends on, so that a
new fit makes only the gate's results anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import coeffs
from calibrate.errors import InvalidOption
from calibrate.model.prompts import PromptSet
from calibrate.runs.entry_file import VERIFIED_WARNING, same_gate, update_entry
from calibrate.runs.folder import RunFolder
from calibrate.runs.pairs import seconds_per_prompt
from calibrate.runs.purposes import JUDGED, held_out_prompts, note
from calibrate.text import duration
from calibrate.trials.baselines import DEFAULT_FRACTIONS, check_budget, default_budgets
from calibrate.trials.bench import Bench
from calibrate.trials.case import Case, open_case
from calibrate.trials.lpips import Lpips
from calibrate.trials.measures import MEASURES, measured
from calibrate.trials.setting import GATE, Entered
from calibrate.trials.through import check_through
from calibrate.verifying import comparison as verdict
from calibrate.verifying.lineup import Lineup, checked_policies, entered, runs_to_come
from calibrate.verifying.results import Verification, write_verification
from calibrate.verifying.tuning import given_gate
from coeffs import Entry

NUM_PROMPTS = 10
AVERAGE_SHARE = float(np.mean(DEFAULT_FRACTIONS))  # of an uncached run that a cached one takes
Say = Callable[[str], None]


def verify(
    source: str | os.PathLike | Entry,
    *,
    model: Any = None,
    prompts: str | os.PathLike | Sequence[str] | None = None,
    num_prompts: int = NUM_PROMPTS,
    seed: int = 0,
    images: Iterable[str | os.PathLike] = (),
    budgets: Sequence[int] | None = None,
    thresholds: Sequence[float] | None = None,
    policies: Sequence[str] | None = None,
    registry: str | os.PathLike | None = None,
    out: str | os.PathLike | None = None,
    dtype: str | None = None,
    device: str = "auto",
    cpu_offload: bool = False,
    allow_pickle: bool = False,
    pipe_args: Mapping[str, Any] | None = None,
    lpips: bool = False,
    through: Sequence[str] = (),
    generate: Callable[..., Any] | None = None,
    modules: Any = None,
    progress: bool = True,
    say: Say = lambda text: None,
) -> Verification:
    """Run the model uncached and under every policy, compare, and write the verified thresholds into the entry.

    Args:
        source: A run folder with its ``entry.yaml``, or a registry entry, its name or its file.
        model: A loaded pipeline, or the name or folder of one; by default what the run or the entry was made with.
        prompts: A file, a shipped set or texts; prompts that the run recorded are left out. By default the model's own
            set, and where the set ``default`` is used up the shipped ``held-out``.
        budgets: Numbers of computed steps, five by default; ``thresholds`` of the fitted gate instead.
        policies: Keys of :data:`calibrate.verifying.lineup.POLICIES`, or ``all``; by default gate, plan, uniform and
            fewer-steps.
        out: Folder for an entry without a run (default: ``runs/verify-<label>``).
        generate, modules: A model of your own, as :func:`calibrate.record` was given it.
        lpips: Also measure LPIPS; needs ``pip install 'teacal[lpips]'``.
        through: Engines whose own code runs the entry's plans as they are exported for it, beside our replay of them;
            then the plans are what is compared, unless ``policies`` names others.

    Raises:
        CalibrateError, CoeffsError, RuntimeCacheError: What cannot be verified, and why.
    """
    exported = [f"plan-{engine}" for engine in through]
    chosen = checked_policies([*(policies or ["plan"]), *exported] if through else policies)
    if budgets and thresholds:
        raise InvalidOption(
            "--budgets and --thresholds: one follows from the other; give one of them"
        )
    if any(value < 0 or not np.isfinite(value) for value in thresholds or ()):
        raise InvalidOption(f"--thresholds {list(thresholds or ())}: expected numbers of 0 or more")
    perceptual = Lpips() if lpips else None
    case = open_case(
        source,
        model=model,
        registry=registry,
        out=out,
        dtype=dtype,
        device=device,
        cpu_offload=cpu_offload,
        allow_pickle=allow_pickle,
        pipe_args=pipe_args,
        generate=generate,
        modules=modules,
    )
    for engine in through:
        plans = check_through(engine, case.entry, case.num_steps)
        budgets = budgets or [plan.schedule.count("C") for plan in plans if not thresholds]
    for budget in budgets or ():
        check_budget(budget, case.num_steps)
    held_out = held_out_prompts(case.purposes, case.offered(prompts, seed, images), num_prompts)
    thresholds = sorted(set(thresholds or ()))
    steps = sorted(set(budgets or default_budgets(case.num_steps)), reverse=True)
    expected = _announce(
        case, chosen, len(thresholds) or len(steps), held_out, bool(thresholds), say
    )
    bench = Bench(case, held_out, perceptual, progress)
    with closing(bench):
        bench.expect(expected)
        results, refused = bench.results(
            _to_run(case, bench, steps, thresholds, chosen, registry, say)
        )
    if results.empty:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise InvalidOption(f"no policy could be run ({reasons})")
    found = _conclude(case, bench, results, refused)
    write_verification(found)
    note(case.folder, [prompt.prompt_id for prompt in held_out.prompts], JUDGED)
    _write_verified(case, found, say)
    return found


def _to_run(
    case: Case,
    bench: Bench,
    steps: list[int],
    thresholds: list[float],
    chosen: Sequence[str],
    registry: str | os.PathLike | None,
    say: Say,
) -> Entered:
    """Every setting of the chosen policies at these numbers of steps, or at the gate's own under given thresholds."""
    recorded = case.run or bench.signals()
    if thresholds:
        given = given_gate(case.entry, thresholds, recorded)
        steps = sorted({setting.budget for setting in given}, reverse=True)
    lineup = Lineup(
        entry=case.entry,
        run=recorded,
        num_steps=case.num_steps,
        budgets=steps,
        thresholds=thresholds,
        counted=bench.tuning_count,
        known=coeffs.entries(None if registry is None else Path(registry)),
        transformer_class=case.transformer_class,
    )
    return entered(lineup, chosen, say)


def _announce(
    case: Case, chosen: Sequence[str], budgets: int, prompts: PromptSet, given: bool, say: Say
) -> int:
    """Say how many runs there will be at most, and about how long they take; the number of runs."""
    count = len(prompts.prompts)
    judging, tuning = runs_to_come(chosen, case.entry, budgets, count, given)
    text = f"{count} prompts, {budgets} budgets: {2 * count} uncached runs, {judging} cached ones"
    text += f", up to about {tuning} to tune by" if tuning else ""
    seconds = None if case.run is None else seconds_per_prompt(RunFolder.open(case.folder))
    if seconds is not None:
        cached = AVERAGE_SHARE * (judging + tuning)
        text += f"; about {duration(seconds * (2 * count + cached))} by the recorded timing"
    say(text)
    return 2 * count + judging + tuning


def _write_verified(case: Case, found: Verification, say: Say) -> None:
    """Verified thresholds into the entry, unless a fit has written it anew since the verification began."""

    def change(now: Entry | None) -> Entry:
        if now is None or same_gate(now, case.entry):
            return verified_entry(now or case.entry, found)
        say(
            "entry.yaml was fitted anew in the meantime and is left as it is: what was verified "
            "belongs to other coefficients; run `calibrate verify` again"
        )
        return now

    update_entry(case.folder / "entry.yaml", change)


def verified_entry(entry: Entry, found: Verification) -> Entry:
    """The entry with the fitted gate's verified thresholds, and with a warning where it did not win."""
    rows = found.summary[(found.summary["policy"] == GATE) & (found.summary["broken"] == 0)]
    rows = rows.sort_values("threshold").to_dict("records")
    verified = [_threshold(row, found.facts["device"]) for row in rows]
    kept = [row for row in entry.thresholds if row.kind != "verified"]
    warnings = [text for text in entry.warnings if not text.startswith(VERIFIED_WARNING)]
    deciding = verdict.deciding(found.comparisons) if found.comparisons else []
    if deciding and not any(one.outcome == "better" for one in deciding):
        warnings.append(VERIFIED_WARNING + found.headline)
    return replace(entry, thresholds=(*kept, *verified), warnings=tuple(warnings))


def _threshold(row: dict[str, Any], device: str) -> coeffs.Threshold:
    fields = coeffs.Threshold.__dataclass_fields__
    figures = {
        name: float(row[name])
        for name in MEASURES
        if name in fields and np.isfinite(row.get(name, np.nan))
    }
    return coeffs.Threshold(
        threshold=row["threshold"],
        computed_steps=row["computed_steps"],
        num_steps=row["num_steps"],
        speedup=row["speedup"],
        kind="verified",
        hardware=device,
        worst_psnr_db=row["worst"] if row["measure"] == "psnr_db" else None,
        note=f"{row['prompts']} held-out prompts; speed-up of the whole pipeline call",
        **figures,
    )


def _conclude(
    case: Case, bench: Bench, results: pd.DataFrame, refused: dict[str, str]
) -> Verification:
    comparisons = verdict.judge(results, GATE)
    broken = results.groupby("policy")["broken"].sum()
    facts = {
        "headline": _headline(comparisons, refused),
        "entry": case.entry.label,
        "model": str(case.manifest.get("model") or case.entry.model),
        "transformer_class": case.transformer_class,
        "device": case.session.device_name,
        "num_steps": case.num_steps,
        "prompts": [prompt.as_dict() for prompt in bench.prompts.prompts],
        "prompt_set": bench.prompts.name,
        "refused": refused,
        "broken": {str(name): int(count) for name, count in broken.items() if count},
        "uncached_seconds": float(results["uncached_seconds"].mean()),
        "floor": bench.floor(),
        "drift": _drift(results[results["policy"] == GATE]),
        "measures": {measure.name: measure.text for measure in measured(results)},
    }
    summary = verdict.summarize(results)
    return Verification(results, summary, comparisons, facts, case.folder / "verify")


def _headline(comparisons: list[verdict.Comparison], refused: dict[str, str]) -> str:
    if GATE in refused:
        return f"The {GATE} could not be run: {refused[GATE]}."
    return verdict.headline(comparisons)


def _drift(gate: pd.DataFrame) -> dict[str, float] | None:
    """How far the replay lies from the real runs of the fitted gate; None where it did not run."""
    if gate.empty:
        return None
    fewer = gate["replayed_steps"] - gate["computed_steps"]
    return {
        "disagreeing_steps": float(gate["disagreement"].mean()),
        "most_disagreeing_steps": float(gate["disagreement"].max()),
        "replayed_minus_real_steps": float(fewer.mean()),
    }
