"""Verification: real cached runs against uncached ones, with the same seeds, on prompts that were never fitted.

Everything under ``verify/`` is resumable: a result is one line, named by the hash of all that it depends on, so that a
new fit makes only the gate's results anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import coeffs
from calibrate.errors import InvalidOption
from calibrate.model.prompts import PromptSet
from calibrate.recording.launch import rank, world_size
from calibrate.runs.entry_file import VERIFIED_WARNING, same_gate, update_entry
from calibrate.runs.folder import RunFolder
from calibrate.runs.lock import alone, held
from calibrate.runs.pairs import seconds_per_prompt
from calibrate.runs.purposes import JUDGED, held_out_prompts, note
from calibrate.text import duration
from calibrate.trials.baselines import DEFAULT_FRACTIONS, check_budget, default_budgets
from calibrate.trials.bench import Bench
from calibrate.trials.case import Case, open_case
from calibrate.trials.lpips import Lpips
from calibrate.trials.measures import MEASURES, measured
from calibrate.trials.setting import GATE
from calibrate.trials.through import check_through
from calibrate.verifying.comparison import deciding, headline, judge
from calibrate.verifying.lineup import Lineup, checked_policies, entered, runs_to_come
from calibrate.verifying.results import Verification, write_verification
from calibrate.verifying.tuning import TuningRuns, given_gate, unsteady
from coeffs import Entry
from runtime.compat.diffusers_private import lockstep_group

NUM_PROMPTS = 10
# Of an uncached run that a cached one takes.
AVERAGE_SHARE = float(np.mean(DEFAULT_FRACTIONS))
Say = Callable[[str], None]


@alone("verifying", shared=True)
def verify(
    source: str | os.PathLike | Entry,
    *,
    prompts: str | os.PathLike | Sequence[str] | None = None,
    num_prompts: int = NUM_PROMPTS,
    seed: int = 0,
    images: Iterable[str | os.PathLike] = (),
    budgets: Sequence[int] | None = None,
    thresholds: Sequence[float] | None = None,
    policies: Sequence[str] | None = None,
    registry: str | Path | None = None,
    lpips: bool = False,
    through: Sequence[str] = (),
    progress: bool = True,
    say: Say = lambda text: None,
    **loading: Any,
) -> Verification | None:
    """Run the model uncached and under every policy, compare, and write the verified thresholds into the entry.

    Ranks of one launch that hold the folder together share the prompts: rank 0 concludes, the others return None.

    Args:
        source: A run folder with its ``entry.yaml``, or a registry entry, its name or its file.
        prompts: A file, a shipped set or texts; prompts that the run recorded are left out. By default the model's own
            set, and where the set ``default`` is used up the shipped ``held-out``.
        budgets: Numbers of computed steps, five by default; ``thresholds`` of the fitted gate instead.
        policies: Keys of :data:`calibrate.verifying.lineup.POLICIES`, or ``all``; by default gate, plan, uniform and
            fewer-steps.
        lpips: Also measure LPIPS; needs ``pip install 'teacal[lpips]'``.
        through: Engines whose own code runs the entry's plans as they are exported for it, beside our replay of them;
            then the plans are what is compared, unless ``policies`` names others.
        loading: How the model is loaded and called, as :func:`calibrate.trials.case.open_case` takes it: ``model``
            (a loaded pipeline, or the name or folder of one; by default what the run or the entry was made with),
            ``out`` (folder for an entry without a run, by default ``runs/verify-<label>``), ``dtype``, ``device``,
            ``cpu_offload``, ``allow_pickle``, ``pipe_args``; ``generate`` and ``modules`` for a model of your own.

    Raises:
        CalibrateError, CoeffsError, RuntimeCacheError: What cannot be verified, and why.
    """
    exported = [f"plan-{engine}" for engine in through]
    chosen = checked_policies([*(policies or ["plan"]), *exported] if through else policies)
    thresholds = sorted(set(thresholds or ()))
    if budgets and thresholds:
        raise InvalidOption(
            "--budgets and --thresholds: one follows from the other; give one of them"
        )
    if any(value < 0 or not np.isfinite(value) for value in thresholds):
        raise InvalidOption(f"--thresholds {thresholds}: expected numbers of 0 or more")
    perceptual = Lpips() if lpips else None
    case = open_case(source, registry=registry, **loading)
    for engine in through:
        plans = check_through(engine, case.entry, case.num_steps)
        budgets = budgets or [plan.schedule.count("C") for plan in plans if not thresholds]
    for budget in budgets or ():
        check_budget(budget, case.num_steps)
    held_out = held_out_prompts(
        case.purposes, case.offered(prompts, seed, images), num_prompts
    )
    steps = sorted(set(budgets or default_budgets(case.num_steps)), reverse=True)
    expected = _announce(case, chosen, steps, thresholds, held_out, say)
    _check_ranks(case)
    bench = Bench(case, held_out, perceptual, progress, held[case.folder])
    with closing(bench), bench.alone():
        bench.expect(expected)
        recorded = case.run or bench.signals()
        given = given_gate(case.entry, thresholds, recorded) if thresholds else []
        lineup = Lineup(
            entry=case.entry,
            run=recorded,
            num_steps=case.num_steps,
            budgets=sorted({setting.budget for setting in given}, reverse=True) or steps,
            given=given,
            runs=TuningRuns(bench),
            known=coeffs.entries(registry),
            transformer_class=case.transformer_class,
        )
        to_run = entered(lineup, chosen, say)
    results, refused = bench.results(to_run)
    if rank() != 0:
        return None
    if results.empty:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise InvalidOption(f"no policy could be run ({reasons})")
    facts = _facts(case, bench, results, refused)
    tuned = [setting for setting in to_run.settings if setting.policy == GATE and not given]
    facts["tuning"] = unsteady(case.entry, recorded, tuned)
    verification = Verification(results, facts, case.folder / "verify")
    write_verification(verification)
    note(case.folder, [prompt.prompt_id for prompt in held_out.prompts], JUDGED)
    _write_verified(case, verification, say)
    return verification


def _check_ranks(case: Case) -> None:
    """Refuse ranks that run every forward together: one that took a prompt of its own would wait for ever."""
    if world_size() == 1:
        return
    for name, module in case.session.modules.items():
        if lockstep_group(module) is not None:
            raise InvalidOption(
                f"{name}: ranks that hold one model together cannot share prompts; verify in one process"
            )


def _announce(
    case: Case,
    chosen: Sequence[str],
    steps: Sequence[int],
    thresholds: Sequence[float],
    prompts: PromptSet,
    say: Say,
) -> int:
    """Say how many runs there will be at most, and about how long they take; the number of runs."""
    count, budgets = len(prompts.prompts), len(thresholds or steps)
    judging, tuning = runs_to_come(chosen, case.entry, budgets, count, bool(thresholds))
    text = f"{count} prompts, {budgets} budgets: {2 * count} uncached runs, {judging} cached ones"
    text += f", up to about {tuning} to tune by" if tuning else ""
    seconds = None if case.run is None else seconds_per_prompt(RunFolder.open(case.folder))
    if seconds is not None:
        expected = seconds * (2 * count + AVERAGE_SHARE * (judging + tuning))
        text += f"; about {duration(expected)} by the recorded timing"
    say(text)
    return 2 * count + judging + tuning


def _facts(
    case: Case, bench: Bench, results: pd.DataFrame, refused: dict[str, str]
) -> dict[str, Any]:
    """What a reader needs besides the results."""
    comparisons = judge(results, GATE)
    opening = headline(comparisons)
    if GATE in refused:
        opening = f"The {GATE} could not be run: {refused[GATE]}."
    broken = results.groupby("policy")["broken"].sum()
    return {
        "headline": opening,
        "entry": case.entry.label,
        "model": str(case.manifest.get("model") or case.entry.model),
        "transformer_class": case.transformer_class,
        "device": case.session.device_name,
        "num_steps": case.num_steps,
        "prompts": [prompt.as_dict() for prompt in bench.prompts.prompts],
        "prompt_set": bench.prompts.name,
        "refused": refused,
        "broken": {str(name): int(count) for name, count in broken[broken > 0].items()},
        "uncached_seconds": float(results["uncached_seconds"].mean()),
        "floor": bench.floor(),
        "drift": _drift(results[results["policy"] == GATE]),
        "measures": {measure.name: measure.text for measure in measured(results)},
    }


def _drift(gate: pd.DataFrame) -> dict[str, float] | None:
    """How far the replay lies from the real runs of the fitted gate; None where it did not run."""
    if gate.empty:
        return None
    return {
        "disagreeing_steps": float(gate["disagreement"].mean()),
        "most_disagreeing_steps": float(gate["disagreement"].max()),
    }


def _write_verified(case: Case, verification: Verification, say: Say) -> None:
    """Verified thresholds into the entry, unless a fit has written it anew since the verification began."""

    def change(now: Entry | None) -> Entry:
        if now is None or same_gate(now, case.entry):
            return verified_entry(now or case.entry, verification)
        say(
            "entry.yaml was fitted anew in the meantime and is left as it is: what was verified "
            "belongs to other coefficients; run `calibrate verify` again"
        )
        return now

    update_entry(case.folder / "entry.yaml", change)


def verified_entry(entry: Entry, verification: Verification) -> Entry:
    """The entry with the fitted gate's verified thresholds, and with a warning where it did not win."""
    table, device = verification.summary, verification.facts["device"]
    rows = table[(table["policy"] == GATE) & (table["broken"] == 0)].sort_values("threshold")
    verified = [_threshold(row, device) for row in rows.to_dict("records")]
    kept = [row for row in entry.thresholds if row.kind != "verified"]
    warnings = [text for text in entry.warnings if not text.startswith(VERIFIED_WARNING)]
    outcomes = {one.outcome for one in deciding(verification.comparisons)}
    if outcomes and "better" not in outcomes:
        warnings.append(VERIFIED_WARNING + verification.headline)
    return replace(entry, thresholds=(*kept, *verified), warnings=tuple(warnings))


def _threshold(row: dict[str, Any], device: str) -> coeffs.Threshold:
    fields = coeffs.Threshold.__dataclass_fields__
    figures = {name: row[name] for name in MEASURES if name in fields and name in row}
    return coeffs.Threshold(
        threshold=row["threshold"],
        computed_steps=row["computed_steps"],
        num_steps=row["num_steps"],
        speedup=row["speedup"],
        kind="verified",
        hardware=device,
        worst_psnr_db=row["worst"] if row["measure"] == "psnr_db" else None,
        note=f"{row['prompts']} held-out prompts; speed-up of the whole pipeline call",
        **{name: value for name, value in figures.items() if np.isfinite(value)},
    )
