"""Certification: the fastest setting of each policy that keeps a promise, proven on prompts that nothing has seen.

Results are kept as `calibrate verify` keeps them, so that an interrupted certification continues.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import coeffs
from calibrate import __version__
from calibrate.certifying.candidates import POLICIES, first_of, offered, sequences, unseen
from calibrate.certifying.tiers import USUAL_TIERS, Demand, Tier
from calibrate.errors import InvalidOption
from calibrate.fitting.draft import protocol_of
from calibrate.model.prompts import PromptSet
from calibrate.model.protocol import canonical_sha256
from calibrate.runs.entry_file import same_gate, update_entry
from calibrate.runs.folder import RunFolder
from calibrate.runs.lock import alone
from calibrate.runs.pairs import seconds_per_prompt
from calibrate.runs.purposes import note
from calibrate.text import duration
from calibrate.trials.bench import Bench
from calibrate.trials.case import Case, open_case
from calibrate.trials.lpips import Lpips
from calibrate.trials.measures import MEASURES, measured
from calibrate.trials.setting import Entered, Setting
from coeffs import Certificate, Entry

RISK = 0.05  # one prompt in twenty
CONFIDENCE = 0.95  # the level of every interval in this project
Say = Callable[[str], None]


@dataclass(frozen=True)
class Certification:
    """What was certified.

    Attributes:
        certificates: Per tier and policy the fastest setting that keeps the promise.
        unreached: One sentence for every tier that no policy keeps.
        refused: Policy -> why it could not be run.
        folder: The run whose entry holds the certificates.
    """

    certificates: tuple[Certificate, ...]
    unreached: tuple[str, ...]
    refused: dict[str, str]
    folder: Path


@dataclass(frozen=True)
class Tried:
    """A setting that was run, its results, and the tiers that it and all before it keep."""

    setting: Setting
    results: pd.DataFrame
    kept: list[Tier]


@alone("certifying")
def certify(
    source: str | os.PathLike,
    *,
    tiers: Sequence[Tier] = USUAL_TIERS,
    risk: float = RISK,
    confidence: float = CONFIDENCE,
    policies: Sequence[str] = tuple(POLICIES),
    num_prompts: int | None = None,
    prompts: str | os.PathLike | Sequence[str] | None = None,
    seed: int = 0,
    images: Iterable[str | os.PathLike] = (),
    progress: bool = True,
    say: Say = lambda text: None,
    **loading: Any,
) -> Certification:
    """Find the fastest setting of each policy that keeps each tier's limits, and write certificates into the entry.

    Args:
        source: A run with its ``entry.yaml``; an entry alone does not tell which prompts it was made with.
        tiers: What is promised; by default ``lossless`` and ``high``.
        risk: The share of prompts that may miss a limit.
        confidence: That no certificate of this call is false.
        policies: Keys of :data:`calibrate.certifying.candidates.POLICIES`.
        num_prompts: By default the fewest that can prove the risk.
        loading: How the model is loaded and called, as :func:`calibrate.trials.case.open_case` takes it.

    Raises:
        CalibrateError, CoeffsError, RuntimeCacheError: What cannot be certified, and why.
    """
    names = {tier.name for tier in tiers}
    if not tiers or len(names) < len(tiers):
        raise InvalidOption("expected tiers, each with a name of its own")
    case = open_case(checked_run(source), **loading)
    candidates = sequences(case, policies)
    demand = Demand(risk, confidence, len(candidates) * len(tiers))
    count = num_prompts or demand.prompts_needed
    tried = [[one.policy, one.identity()] for settings in candidates for one in settings]
    question = [
        [str(tier) for tier in tiers],
        risk,
        confidence,
        *policies,
        count,
        seed,
        tried,
    ]
    purpose = f"certifying {canonical_sha256(question)[:12]}"
    sets = offered(case, prompts, seed, images)
    fresh = unseen(case.purposes, sets, purpose)
    _check_count(demand, count, len(fresh))
    chosen = first_of(fresh, count, sets)
    misses = demand.most_missed(count)
    _announce(
        case,
        candidates,
        chosen,
        f"{demand.tests} tests that pass with up to {misses} misses",
        say,
    )
    # Before anything is run: who asks something else, or asks with more prompts, takes others.
    note(case.folder, list(fresh)[:count], purpose)
    perceptual = Lpips() if any("lpips" in tier.limits for tier in tiers) else None
    refused: dict[str, str] = {}
    with closing(Bench(case, chosen, perceptual, progress)) as bench:
        tests = [
            _tested(bench, settings, tiers, misses, refused, say) for settings in candidates
        ]
        if not any(tests):
            raise InvalidOption(f"no policy could be run ({'; '.join(refused.values())})")
        certificates = []
        for tier in tiers:
            passed = [[test for test in sequence if tier in test.kept] for sequence in tests]
            fastest = [sequence[-1] for sequence in passed if sequence]
            certificates += [
                _certificate(case, chosen, demand, tier, test) for test in fastest
            ]
    reached = {certificate.tier for certificate in certificates}
    first = [sequence[0] for sequence in tests if sequence]
    unreached = [
        _unreached(tier, first, risk, misses) for tier in tiers if tier.name not in reached
    ]
    _write(case, names, certificates, say)
    return Certification(tuple(certificates), tuple(unreached), refused, case.folder)


def checked_run(source: str | os.PathLike) -> Path:
    """The run's folder; refuses an entry."""
    if not (Path(source) / "run.yaml").exists():
        raise InvalidOption(
            f"{source}: no run, and only a run tells which prompts its entry was made with; give the run's folder"
        )
    return Path(source)


def _check_count(demand: Demand, count: int, there: int) -> None:
    needed = max(demand.prompts_needed, count)
    usable = min(count, there)
    if usable >= needed:
        return
    advice = "" if usable == 0 else f", or for --risk {demand.lowest_risk(usable):g}"
    raise InvalidOption(
        f"impossible with {usable} prompts that served nothing else: risk {demand.risk:g} at confidence "
        f"{demand.confidence:g} in {demand.tests} tests needs {needed}; ask for as many, of a larger set with "
        f"--prompts{advice}"
    )


def _announce(
    case: Case, candidates: list[list[Setting]], prompts: PromptSet, tests: str, say: Say
) -> None:
    """Say how many runs there will be at most, and about how long they take."""
    samples = len(prompts.prompts)
    budgets = [setting.budget for settings in candidates for setting in settings]
    text = f"{samples} samples of {prompts.name}, {tests}: "
    text += f"{2 * samples} uncached runs, up to {samples * len(budgets)} cached ones"
    seconds = seconds_per_prompt(RunFolder.open(case.folder))
    if seconds is not None:
        runs = samples * (2 + sum(budgets) / case.num_steps)
        text += f"; at most about {duration(seconds * runs)} by the recorded timing"
    say(text)


def _tested(
    bench: Bench,
    settings: list[Setting],
    tiers: Sequence[Tier],
    misses: int,
    refused: dict[str, str],
    say: Say,
) -> list[Tried]:
    """Run a policy's settings until every tier has failed: what comes after a failure is not tested."""
    tests: list[Tried] = []
    for setting in settings:
        say(f"{setting.policy} at {setting.budget} of {bench.case.num_steps} steps")
        rows, reasons = bench.results(Entered([setting]))
        refused |= reasons
        if rows.empty:
            break
        tiers = [tier for tier in tiers if tier.missed(rows).sum() <= misses]
        tests.append(Tried(setting, rows, list(tiers)))
        if not tiers:
            break
    return tests


def _certificate(
    case: Case, prompts: PromptSet, demand: Demand, tier: Tier, test: Tried
) -> Certificate:
    rows, missed = test.results, tier.missed(test.results)
    speedup = float((rows["uncached_seconds"] / rows["seconds"]).mean())
    kind: Any = test.setting.kind
    return Certificate(
        tier=tier.name,
        policy=kind,
        plan=test.setting.plan,
        threshold=test.setting.threshold,
        limits=dict(tier.limits),
        risk=demand.risk,
        confidence=demand.confidence,
        tests=demand.tests,
        prompts=len(missed),
        missed=int(missed.sum()),
        broken=int(rows.groupby("prompt_id")["broken"].any().sum()),
        prompt_set=prompts.name,
        prompts_sha256=prompts.sha256,
        computed_steps=float(rows["computed_steps"].mean()),
        num_steps=case.num_steps,
        speedup=speedup if np.isfinite(speedup) else None,
        figures={
            measure.name: float(rows[measure.name].mean()) for measure in measured(rows)
        },
        protocol=protocol_of(case.session.identity["protocol"]),
        source=coeffs.Source(
            run_id=case.manifest.get("run_id"),
            toolkit=__version__,
            torch=version("torch"),
            diffusers=version("diffusers"),
            device=case.session.device_name,
            created=f"{datetime.now(UTC):%Y-%m-%d}",
        ),
    )


def _unreached(tier: Tier, tests: list[Tried], risk: float, misses: int) -> str:
    """What was asked for, and the strictest limit that the first test of some policy passes."""
    measure = MEASURES[next(iter(tier.limits))]
    sign = 1 if measure.higher_is_better else -1
    reach = [tier.within_reach(test.results, misses) for test in tests]
    best = int(np.argmax(sign * np.array(reach)))
    setting = tests[best].setting
    return (
        f"{tier}: no policy keeps it for {100 - 100 * risk:.4g} % of all prompts; the best that is reachable is "
        f"{measure.label} {reach[best]:.4g} {measure.unit} by {setting.policy} at {setting.budget} steps"
    )


def _write(case: Case, names: set[str], certificates: list[Certificate], say: Say) -> None:
    """Certificates in place of earlier ones of the same tiers; hours may have passed since the entry was read."""

    def change(now: Entry | None) -> Entry:
        entry = now or case.entry
        valid = certificates
        if not same_gate(entry, case.entry):
            say(
                "entry.yaml was fitted anew in the meantime: certificates of its old gate are left out"
            )
            valid = [one for one in certificates if one.policy != "gate"]
        kept = [one for one in entry.certificates if one.tier not in names]
        return replace(entry, certificates=(*kept, *valid))

    update_entry(case.folder / "entry.yaml", change)
