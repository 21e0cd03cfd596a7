"""What is promised: limits on a sample's measures, and how many prompts prove that most prompts keep them.

A policy's settings are tested one after the other, from the most computed steps to the fewest, until one fails
(fixed-sequence testing). Each test is exact binomial; policies and tiers share the error probability equally
(Bonferroni). So with probability ``confidence`` no certificate of a call is false, whatever the distribution of
prompts: Learn then Test, Angelopoulos et al., arXiv 2110.01052.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from calibrate.errors import InvalidOption
from calibrate.trials.measures import MEASURES, capped
from coeffs.entry.certificates import EXACT, LIMITS, chance, limits_text

# As entries and exports take names.
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
# Name on the command line -> measure.
OPTIONS = {name.removesuffix("_db"): name for name in LIMITS}


@dataclass(frozen=True)
class Tier:
    """A name and its limits by measure, all of which a sample has to keep."""

    name: str
    limits: Mapping[str, float]

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name) or self.name == EXACT:
            raise InvalidOption(
                f"tier {self.name!r}: expected a name of letters, digits and _.-, and not {EXACT}, which is the tier "
                "without a cache"
            )

    def __str__(self) -> str:
        return f"{self.name} ({limits_text(self.limits)})"

    def missed(self, results: pd.DataFrame) -> pd.Series:
        """Prompt -> whether any of its samples is broken or misses a limit; identical samples miss none."""
        broken = results["broken"].astype(bool)
        kept = pd.Series(True, index=results.index)
        # Where all are broken, there are no figures.
        for name, limit in self.limits.items() if not broken.all() else ():
            if name not in results:
                known = ", ".join(measure for measure in LIMITS if measure in results)
                raise InvalidOption(
                    f"a limit on {name}, but these samples have {known}: set it on those"
                )
            sign = MEASURES[name].sign
            kept &= sign * capped(results, name) >= sign * limit  # not without a figure
        missed = broken | ~(kept | results["identical"].astype(bool))
        return missed.groupby(results["prompt_id"]).any()

    def within_reach(self, results: pd.DataFrame, misses: int) -> float:
        """The strictest limit on its first measure that all but ``misses`` prompts keep."""
        measure = MEASURES[next(iter(self.limits))]
        if results["broken"].all():
            return measure.broken
        figures = measure.sign * capped(results, measure.name)
        worst = figures.groupby(results["prompt_id"]).min().sort_values()
        return measure.sign * float(worst.iloc[misses])


# `high` is the bar of SGLang's tier of that name: PSNR above 25 dB against the reference (its pull request 33453).
# `lossless` is PSNR 40 dB, a root mean square error of 1 % of the range; it is not what engines call lossless, which
# is the uncached path, `exact` here.
USUAL_TIERS = (Tier("lossless", {"psnr_db": 40.0}), Tier("high", {"psnr_db": 25.0}))


def parse_tier(text: str) -> Tier:
    """The tier in ``name:psnr=35,ssim=0.95``."""
    name, _, limits = text.partition(":")
    pairs = [pair.split("=") for pair in limits.split(",")]
    try:
        given = {OPTIONS[measure.strip()]: float(limit) for measure, limit in pairs}
    except (KeyError, ValueError):
        given = {}
    if not given or not all(map(math.isfinite, given.values())):
        raise InvalidOption(
            f"tier {text!r}: expected name:psnr=35,ssim=0.95 with limits on {', '.join(OPTIONS)}"
        )
    return Tier(name, given)


@dataclass(frozen=True)
class Demand:
    """What is to be proven.

    Attributes:
        risk: The share of prompts that may miss a limit.
        confidence: That nothing false is certified.
        tests: Sequences of tests that share the error probability: policies times tiers.
    """

    risk: float
    confidence: float
    tests: int

    def __post_init__(self) -> None:
        if not (0 < self.risk < 1 and 0 < self.confidence < 1):
            raise InvalidOption(
                f"--risk {self.risk:g}, --confidence {self.confidence:g}: expected numbers between 0 and 1"
            )

    @property
    def level(self) -> float:
        """The error probability of one test."""
        return (1 - self.confidence) / self.tests

    def check(self, count: int, there: int) -> None:
        """Refuse to prove it with ``count`` prompts of which only so many are ``there``."""
        needed = max(self.prompts_needed, count)
        if there >= needed:
            return
        advice = f", or for --risk {self.lowest_risk(there):g}" if there else ""
        raise InvalidOption(
            f"impossible with {there} prompts that served nothing else: risk {self.risk:g} at confidence "
            f"{self.confidence:g} in {self.tests} tests needs {needed}; ask for as many, of a larger set with "
            f"--prompts{advice}"
        )

    @property
    def prompts_needed(self) -> int:
        """The fewest prompts that can prove it, if none of them misses."""
        count = math.ceil(math.log(self.level) / math.log1p(-self.risk))
        # Rounding can put the logarithms on the other side of a whole number than the test.
        return count if self.most_missed(count) >= 0 else count + 1

    def lowest_risk(self, prompts: int) -> float:
        """The lowest risk that so many prompts can prove, rounded up."""
        return math.ceil(1000 * (1 - self.level ** (1 / prompts))) / 1000

    def most_missed(self, prompts: int) -> int:
        """The most misses among so many prompts that prove it; -1 where there are too few prompts."""
        missed = -1
        while chance(missed + 1, prompts, self.risk) <= self.level:
            missed += 1
        return missed
