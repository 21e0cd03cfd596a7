"""Certification: the fastest setting of each policy that keeps a promise, proven on prompts that nothing has seen.

Results are kept as `calibrate verify` keeps them, so that an interrupted certification continues.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

import coeffs
from calibrate import __version__
from calibrate.certifying.candidates import KEPT_BACK, POLICIES, sequences, unseen
from calibrate.certifying.tiers import USUAL_TIERS, Demand, Tier
from calibrate.errors import InvalidOption
from calibrate.fitting.draft import protocol_of
from calibrate.model.protocol import canonical_sha256
from calibrate.runs.entry_file import same_gate, update_entry
from calibrate.runs.lock import alone
from calibrate.runs.purposes import note
from calibrate.trials.bench import Bench
from calibrate.trials.case import Case, Images, Prompts, Say, open_case
from calibrate.trials.measures import MEASURES, measured
from calibrate.trials.setting import Setting
from coeffs import Certificate, Entry

RISK = 0.05  # one prompt in twenty
CONFIDENCE = 0.95  # the level of every interval in this project


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


@alone("certifying")
def certify(
    source: str | os.PathLike,
    *,
    tiers: Sequence[Tier] = USUAL_TIERS,
    risk: float = RISK,
    confidence: float = CONFIDENCE,
    policies: Sequence[str] = tuple(POLICIES),
    num_prompts: int | None = None,
    prompts: Prompts = None,
    seed: int = 0,
    images: Images = (),
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
    limits = [str(tier) for tier in tiers]
    question = [limits, risk, confidence, *policies, count, seed, tried]
    purpose = f"certifying {canonical_sha256(question)[:12]}"
    chosen = unseen(
        case.purposes, case.offered(prompts, seed, images, KEPT_BACK), count, purpose
    )
    ids = {prompt.prompt_id for prompt in chosen.prompts}
    demand.check(count, len(ids))
    misses = demand.most_missed(count)
    samples, budgets = len(chosen.prompts), [one.budget for one in chain(*candidates)]
    runs = samples * (2 + sum(budgets) / case.num_steps)
    say(
        f"{samples} samples of {chosen.name}, {demand.tests} tests that pass with up to {misses} misses: "
        f"{2 * samples} uncached runs, up to {samples * len(budgets)} cached ones{case.time_of(runs)}"
    )
    # Before anything is run: who asks something else, or asks with more prompts, takes others.
    note(case.folder, ids, purpose)
    bench = Bench(case, chosen, any("lpips" in tier.limits for tier in tiers), progress)
    refused: dict[str, str] = {}
    certified: dict[tuple[str, str], Certificate] = {}
    for settings in candidates:
        kept = list(tiers)
        for setting in settings:
            say(f"{setting.policy} at {setting.budget} of {case.num_steps} steps")
            rows, reasons = bench.results([setting])
            refused |= reasons
            kept = [t for t in kept if len(rows) and t.missed(rows).sum() <= misses]
            for tier in kept:
                certificate = _certificate(bench, demand, tier, setting, rows)
                certified[tier.name, setting.policy] = certificate
            if not kept:  # what comes after a failure is not tested
                break
    first, _ = bench.results([settings[0] for settings in candidates])
    if first.empty:
        raise InvalidOption(f"no policy could be run ({'; '.join(refused.values())})")
    certificates = [one for t in tiers for one in certified.values() if one.tier == t.name]
    reached = {tier for tier, _ in certified}
    unreached = [_unreached(t, first, risk, misses) for t in tiers if t.name not in reached]
    _write(case, names, certificates, say)
    return Certification(tuple(certificates), tuple(unreached), refused, case.folder)


def checked_run(source: str | os.PathLike) -> Path:
    """The run's folder; refuses an entry."""
    if not (Path(source) / "run.yaml").exists():
        raise InvalidOption(
            f"{source}: no run, and only a run tells which prompts its entry was made with; give the run's folder"
        )
    return Path(source)


def _certificate(
    bench: Bench, demand: Demand, tier: Tier, setting: Setting, rows: pd.DataFrame
) -> Certificate:
    case, prompts, missed = bench.case, bench.prompts, tier.missed(rows)
    means = rows[[measure.name for measure in measured(rows)]].mean()
    kind: Any = setting.kind
    return Certificate(
        tier=tier.name,
        policy=kind,
        plan=setting.plan,
        threshold=setting.threshold,
        limits=dict(tier.limits),
        **vars(demand),
        prompts=len(missed),
        missed=int(missed.sum()),
        broken=int(rows.groupby("prompt_id")["broken"].any().sum()),
        prompt_set=prompts.name,
        prompts_sha256=prompts.sha256,
        computed_steps=float(rows["computed_steps"].mean()),
        num_steps=case.num_steps,
        speedup=float((rows["uncached_seconds"] / rows["seconds"]).mean()),
        figures=means.to_dict(),
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


def _unreached(tier: Tier, first: pd.DataFrame, risk: float, misses: int) -> str:
    """What was asked for, and the strictest limit that the first test of some policy passes."""
    measure = MEASURES[next(iter(tier.limits))]
    reached = [
        (tier.within_reach(rows, misses), policy, rows["budget"].iloc[0])
        for policy, rows in first.groupby("policy", sort=False)
    ]
    reach, policy, steps = max(reached, key=lambda of_policy: measure.sign * of_policy[0])
    return (
        f"{tier}: no policy keeps it for {100 - 100 * risk:.4g} % of all prompts; the best that is reachable is "
        f"{measure.label} {reach:.4g} {measure.unit} by {policy} at {steps} steps"
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
