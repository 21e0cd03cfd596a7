"""Verification: real cached runs against uncached ones, with the same seeds, on prompts that were never fitted.

Everything under ``verify/`` is resumable: a result is one line, named by the hash of all that it depends on, so that a
new fit makes only the gate's results anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

import coeffs
from calibrate.errors import InvalidOption, InvalidPrompts
from calibrate.model.prompts import PromptSet, load_prompts
from calibrate.trials import measures as metrics
from calibrate.trials.baselines import check_budget, default_budgets
from calibrate.trials.bench import Bench
from calibrate.trials.case import Case, open_case
from calibrate.trials.lpips import VARIANT, Lpips
from calibrate.verifying import comparison as verdict
from calibrate.verifying.lineup import GATE, POLICIES, contest, entrants, given_gate
from calibrate.verifying.results import Verification, write_verification
from coeffs import Entry

NUM_PROMPTS = 10
HELD_OUT_SET = "held-out"
VERDICT = "on real cached runs: "
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
    lpips: bool = False,
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
        policies: Keys of :data:`calibrate.verifying.lineup.POLICIES`; all by default.
        out: Folder for an entry without a run (default: ``runs/verify-<label>``).
        lpips: Also measure LPIPS; needs ``pip install 'teacal[lpips]'``.

    Raises:
        CalibrateError, CoeffsError, RuntimeCacheError: What cannot be verified, and why.
    """
    chosen = _checked_policies(policies)
    if budgets and thresholds:
        raise InvalidOption(
            "--budgets and --thresholds: one follows from the other; give one of them"
        )
    if any(value < 0 or not np.isfinite(value) for value in thresholds or ()):
        raise InvalidOption(f"--thresholds {list(thresholds)}: expected numbers of 0 or more")
    perceptual = Lpips() if lpips else None
    case = open_case(source, model=model, registry=registry, out=out, dtype=dtype, device=device)
    for budget in budgets or ():
        check_budget(budget, case.num_steps)
    held_out = held_out_prompts(case, prompts, num_prompts, seed, images)
    bench = Bench(case, held_out, perceptual, progress)
    recorded = case.run or bench.signals()
    gate = given_gate(case.entry, sorted(set(thresholds)), recorded) if thresholds else None
    steps = sorted(
        {s.budget for s in gate} if gate else set(budgets or default_budgets(case.num_steps)),
        reverse=True,
    )
    gates = entrants(case.entry, chosen, coeffs.entries(registry), case.transformer_class, recorded)
    bench.entries = gates.gates
    entered = contest(
        gates, recorded, gate, steps, case.num_steps, chosen, bench.tuning_count,
        lambda name: say(f"preparing {name}"),
    )  # fmt: skip
    results, refused = bench.results(entered)
    if results.empty:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise InvalidOption(f"no policy could be run ({reasons})")
    found = _conclude(case, bench, results, refused)
    write_verification(found)
    coeffs.save(verified_entry(case.entry, found), case.folder / "entry.yaml")
    return found


def held_out_prompts(
    case: Case, prompts: Any, num_prompts: int, seed: int, images: Iterable[str | os.PathLike]
) -> PromptSet:
    """Prompts that the run did not record, by content and whatever their seed."""
    recorded = {row["prompt_id"] for row in case.manifest.get("prompts", [])}
    images = list(images)
    sources = [case.prompt_source if prompts is None else prompts]
    if sources == ["default"]:
        sources.append(HELD_OUT_SET)
    for source in sources:
        found = load_prompts(source, seed=seed, images=images)
        unseen = tuple(prompt for prompt in found.prompts if prompt.prompt_id not in recorded)
        if unseen:
            return replace(found, prompts=unseen[:num_prompts])
    raise InvalidPrompts(
        f"{found.name}: every prompt of it was recorded for the fit; give others with --prompts"
    )


def verified_entry(entry: Entry, found: Verification) -> Entry:
    """The entry with the fitted gate's verified thresholds, and with a warning where it did not win."""
    rows = found.summary[(found.summary["policy"] == GATE) & (found.summary["broken"] == 0)]
    thresholds = []
    for row in rows.sort_values("threshold").to_dict("records"):
        values = {name: row.get(name) for name in ("psnr_db", "ssim", "ms_ssim", "latent_rel_l2")}
        thresholds.append(coeffs.Threshold(
            threshold=row["threshold"], computed_steps=row["computed_steps"], num_steps=row["num_steps"],
            speedup=row["speedup"], kind="verified", hardware=found.facts["device"],
            worst_psnr_db=row["worst"] if row["measure"] == "psnr_db" else None,
            note=f"{row['prompts']} held-out prompts; speed-up of the whole pipeline call",
            **{name: float(value) for name, value in values.items() if value is not None and np.isfinite(value)},
        ))  # fmt: skip
    kept = tuple(row for row in entry.thresholds if row.kind != "verified")
    warnings = [text for text in entry.warnings if not text.startswith(VERDICT)]
    if found.comparisons and verdict.deciding(found.comparisons).outcome != "better":
        warnings.append(VERDICT + found.headline)
    return replace(entry, thresholds=(*kept, *thresholds), warnings=tuple(warnings))


def _conclude(
    case: Case, bench: Bench, results: pd.DataFrame, refused: dict[str, str]
) -> Verification:
    comparisons = verdict.judge(results, GATE)
    floors = [bench.facts(prompt)["floor"] for prompt in bench.prompts.prompts]
    variants = metrics.VARIANTS | {"lpips": VARIANT}
    facts = {
        "headline": _headline(comparisons, refused),
        "entry": case.entry.label,
        "model": str(case.manifest.get("model") or case.entry.model),
        "transformer_class": case.transformer_class,
        "device": case.device,
        "num_steps": case.num_steps,
        "prompts": [prompt.as_dict() for prompt in bench.prompts.prompts],
        "prompt_set": bench.prompts.name,
        "refused": refused,
        "broken": {
            str(name): int(count)
            for name, count in results.groupby("policy")["broken"].sum().items()
            if count
        },
        "uncached_seconds": float(results["uncached_seconds"].mean()),
        "floor": {
            "identical": all(floor["identical"] for floor in floors),
            "worst_psnr_db": min(
                (f["psnr_db"] for f in floors if f.get("psnr_db") is not None), default=None
            ),
        },
        "drift": _drift(results[results["policy"] == GATE]),
        "measures": {name: text for name, text in variants.items() if name in results},
    }
    return Verification(
        results, verdict.summarize(results), comparisons, facts, case.folder / "verify"
    )


def _headline(comparisons: list[verdict.Comparison], refused: dict[str, str]) -> str:
    if GATE in refused:
        return f"The {GATE} could not be run: {refused[GATE]}."
    return verdict.headline(comparisons)


def _drift(gate: pd.DataFrame) -> dict[str, float] | None:
    """How far the replay lies from the real runs of the fitted gate; ``None`` where it did not run."""
    if gate.empty:
        return None
    return {
        "disagreeing_steps": float(gate["disagreement"].mean()),
        "most_disagreeing_steps": float(gate["disagreement"].max()),
        "replayed_minus_real_steps": float(
            (gate["replayed_steps"] - gate["computed_steps"]).mean()
        ),
    }


def _checked_policies(policies: Sequence[str] | None) -> list[str]:
    chosen = list(dict.fromkeys(policies or POLICIES))
    for name in chosen:
        if name not in POLICIES:
            raise InvalidOption(f"policy {name!r}: expected {', '.join(POLICIES)}")
    return chosen if "gate" in chosen else ["gate", *chosen]
