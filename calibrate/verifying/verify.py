"""Verification: real cached runs against uncached ones, with the same seeds, on prompts that were never fitted.

Everything under ``verify/`` is resumable: a result is one line, named by the hash of all that it depends on, so that a
new fit makes only the gate's results anew.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from calibrate.runs.lock import Source, alone
from calibrate.runs.purposes import JUDGED, held_out_prompts, note
from calibrate.trials.baselines import DEFAULT_FRACTIONS, check_budget, default_budgets
from calibrate.trials.bench import Bench
from calibrate.trials.case import Case, Images, Prompts, Say, open_case
from calibrate.trials.measures import measured
from calibrate.trials.setting import GATE
from calibrate.trials.through import check_through
from calibrate.verifying.comparison import deciding, headline, judge
from calibrate.verifying.lineup import POLICIES, checked_policies, entered
from calibrate.verifying.results import Verification, write_verification
from calibrate.verifying.tuning import Lineup, given_gate, unsteady
from coeffs import Entry
from runtime.compat.diffusers_private import lockstep_group

NUM_PROMPTS = 10
# Of an uncached run that a cached one takes.
AVERAGE_SHARE = float(np.mean(DEFAULT_FRACTIONS))


@alone("verifying", shared=True)
def verify(
    source: Source,
    *,
    prompts: Prompts = None,
    num_prompts: int = NUM_PROMPTS,
    seed: int = 0,
    images: Images = (),
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
    case = open_case(source, registry=registry, **loading)
    for engine in through:
        plans = check_through(engine, case.entry, case.num_steps)
        budgets = budgets or [plan.schedule.count("C") for plan in plans if not thresholds]
    for budget in budgets or ():
        check_budget(budget, case.num_steps)
    sets = case.offered(prompts, seed, images)
    held_out = held_out_prompts(case.purposes, sets, num_prompts)
    steps = sorted(set(budgets or default_budgets(case.num_steps)), reverse=True)
    expected = _announce(
        case, chosen, len(thresholds or steps), bool(thresholds), held_out, say
    )
    bench = Bench(case, held_out, lpips, progress)
    _check_ranks(case)
    with bench.bar(expected), bench.alone():
        recorded = case.run or bench.signals()
        given = given_gate(case.entry, thresholds, recorded) if thresholds else []
        lineup = Lineup(
            entry=case.entry,
            run=recorded,
            num_steps=case.num_steps,
            budgets=sorted({setting.budget for setting in given}, reverse=True) or steps,
            given=given,
            bench=bench,
            known=coeffs.entries(registry),
            say=say,
        )
        settings, refused = entered(lineup, chosen)
    results, refused = bench.results(settings, refused)
    if rank() != 0:
        return None
    if results.empty:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise InvalidOption(f"no policy could be run ({reasons})")
    tuned = [setting for setting in settings if setting.policy == GATE and not given]
    facts = _facts(bench, results, refused)
    facts["tuning"] = unsteady(case.entry, recorded, tuned)
    verification = Verification(results, facts, bench.folder)
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
    case: Case, chosen: Sequence[str], budgets: int, given: bool, prompts: PromptSet, say: Say
) -> int:
    """Say how many runs there will be at most, and how long they take; the number of them before any is judged."""
    count = len(prompts.prompts)
    policies = [POLICIES[name] for name in chosen if POLICIES[name].enters(case.entry)]
    judging = len(policies) * budgets * count
    # Given thresholds of the fitted gate are not tuned.
    tuning = budgets * sum(p.tuning for p in policies if not (given and p.label == GATE))
    text = f"{count} prompts, {budgets} budgets: {2 * count} uncached runs, {judging} cached ones"
    text += f", up to about {tuning} to tune by" if tuning else ""
    fitting = budgets * len(case.recorded_prompts) * sum(p.is_fitted for p in policies)
    text += f", up to {fitting} to fit on" if fitting else ""
    say(text + case.time_of(2 * count + AVERAGE_SHARE * (judging + tuning + fitting)))
    return 2 * count + tuning


def _facts(bench: Bench, results: pd.DataFrame, refused: dict[str, str]) -> dict[str, Any]:
    """What a reader needs besides the results."""
    case, policies = bench.case, results["policy"]
    broken = policies[results["broken"].astype(bool)].value_counts()
    # How far the replay lies from the real runs of the fitted gate.
    gate, drift = results[policies == GATE], None
    if len(gate):
        wrong = gate["disagreement"]
        drift = {"disagreeing_steps": wrong.mean(), "most_disagreeing_steps": wrong.max()}
    opening = headline(judge(results, GATE))
    if GATE in refused:
        opening = f"The {GATE} could not be run: {refused[GATE]}."
    return {
        "headline": opening,
        "entry": case.entry.label,
        "model": case.manifest.get("model") or case.entry.model,
        "transformer_class": case.identity["classes"][0],
        "device": case.session.device_name,
        "num_steps": case.num_steps,
        "prompts": [prompt.as_dict() for prompt in bench.prompts.prompts],
        "prompt_set": bench.prompts.name,
        "refused": refused,
        "broken": broken.to_dict(),
        "uncached_seconds": float(results["uncached_seconds"].mean()),
        "floor": bench.floor(),
        "drift": drift,
        "measures": {measure.name: measure.text for measure in measured(results)},
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
    # A row's figures are called as the fields are.
    fields = coeffs.Threshold.__dataclass_fields__.keys() & row.keys()
    return coeffs.Threshold(
        kind="verified",
        hardware=device,
        worst_psnr_db=row["worst"] if row["measure"] == "psnr_db" else None,
        note=f"{row['prompts']} held-out prompts; speed-up of the whole pipeline call",
        **{name: row[name] for name in fields if np.isfinite(row[name])},
    )
