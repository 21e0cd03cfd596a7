"""Audit: does a certificate still hold on this machine, with this dtype, these weights, these arguments?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from calibrate.certifying.candidates import KEPT_BACK, setting_of, unseen
from calibrate.certifying.tiers import Demand, Tier
from calibrate.errors import InvalidOption, one_line
from calibrate.fitting.statistics import share_interval
from calibrate.runs.lock import alone
from calibrate.runs.purposes import AUDITED, note
from calibrate.trials.bench import Bench
from calibrate.trials.case import Case, Images, Prompts, Say, open_case
from coeffs import Certificate
from coeffs.entry.certificates import chance, of_tier

# Four misses among so many refute a risk of 5 %, as 27 % of misses give four times in five.
NUM_PROMPTS = 20


@dataclass(frozen=True)
class Audited:
    """What an audit found of one certificate.

    Attributes:
        missed: Of the new ``prompts``.
        p: How likely so many misses are where the promise holds; below ``level`` it is broken.
        proven: Whether the new prompts alone would have certified it.
        results: One row per sample.
    """

    certificate: Certificate
    missed: int
    prompts: int
    p: float
    level: float
    proven: bool
    results: pd.DataFrame

    @property
    def holds(self) -> bool:
        """Whether no greater share missed it than was promised."""
        # Their product may lie below the whole number that is promised: 0.29 * 100.
        promised = self.certificate.risk * self.prompts + 1e-9
        return self.p >= self.level and self.missed <= promised

    @property
    def verdict(self) -> str:
        """Whether it holds, and how much that says."""
        counted = f"{self.missed} of {self.prompts} prompts missed it"
        chance = f"which has probability {self.p:.2g} where it holds"
        if self.p < self.level:
            return f"no: {counted}, {chance}"
        if not self.holds:
            return f"in doubt: {counted}, {chance}; audit more prompts"
        if self.proven:
            return f"yes, proven anew: {counted}"
        _, low, high = share_interval(self.missed, self.prompts)
        return f"yes, as far as so few prompts tell: {counted}, a share of {low:.2g} to {high:.2g}"


@alone("auditing")
def audit(
    source: str | os.PathLike,
    *,
    tiers: Sequence[str] = (),
    num_prompts: int = NUM_PROMPTS,
    prompts: Prompts = None,
    seed: int = 0,
    images: Images = (),
    lora: str | os.PathLike | None = None,
    progress: bool = True,
    say: Say = lambda text: None,
    **loading: Any,
) -> list[Audited]:
    """Run what ``quality=`` takes of each tier against uncached runs, with prompts that nothing has seen.

    Args:
        source: A run, or the name or file of an entry, which does not tell what its prompts served.
        tiers: Names of tiers; by default all.
        lora: Folder or file of a LoRA that is loaded into the pipeline first.
        loading: How the model is loaded and called, as :func:`calibrate.trials.case.open_case` takes it: another
            ``model``, ``dtype``, ``device`` or ``pipe_args`` than were certified.
    """
    case = open_case(source, **loading)
    entry = case.entry
    known = dict.fromkeys(certificate.tier for certificate in entry.certificates)
    if not known or not set(tiers) <= set(known):
        raise InvalidOption(
            f"{entry.label} is certified for {', '.join(known) or 'no tier'}; certify its run with `calibrate certify`"
        )
    # What is in force: of each tier the fastest cache, or fewer steps where no cache is certified.
    certificates = [of_tier(entry.certificates, tier)[0] for tier in tiers or known]
    sets = case.offered(prompts, seed, images, KEPT_BACK)
    chosen = unseen(case.purposes, sets, num_prompts, AUDITED)
    ids = {prompt.prompt_id for prompt in chosen.prompts}
    if len(ids) < num_prompts:
        raise InvalidOption(
            f"--num-prompts {num_prompts}: only {len(ids)} that served nothing else; give others with --prompts"
        )
    # Their figures will be seen: no certificate rests on them afterwards.
    note(case.folder, ids, AUDITED)
    samples = len(chosen.prompts)
    say(f"{2 * samples} uncached runs, {samples * len(certificates)} cached ones")
    _prepare(case, lora)
    bench = Bench(case, chosen, any("lpips" in one.limits for one in certificates), progress)
    return [_audited(bench, one, len(certificates)) for one in certificates]


def _prepare(case: Case, lora: str | os.PathLike | None) -> None:
    """Load the LoRA, and keep apart the results of different weights that go by one name."""
    pipeline, modules = case.session.pipeline, case.session.modules.values()
    if lora is not None:
        try:
            pipeline.load_lora_weights(os.fspath(lora))
        except Exception as error:  # diffusers, peft and safetensors each raise their own
            raise InvalidOption(
                f"--lora {lora}: cannot be loaded ({one_line(error)})"
            ) from error
    parameters = (parameter for module in modules for parameter in module.parameters())
    case.weights["sum"] = sum(
        parameter.double().abs().sum().item() for parameter in parameters
    )


def _audited(bench: Bench, certificate: Certificate, tests: int) -> Audited:
    setting = setting_of(certificate, bench.case.entry)
    results, refused = bench.results([setting])
    if results.empty:
        raise InvalidOption(f"tier {certificate.tier}: {refused[setting.policy]}")
    of_prompt = Tier(certificate.tier, certificate.limits).missed(results)
    missed, prompts = int(of_prompt.sum()), len(of_prompt)
    demand = Demand(certificate.risk, certificate.confidence, tests)
    p = 1 - chance(missed - 1, prompts, demand.risk)
    proven = missed <= demand.most_missed(prompts)
    return Audited(certificate, missed, prompts, p, demand.level, proven, results)
