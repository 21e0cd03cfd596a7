"""Certificates: what is promised of an entry's policy, and the count of prompts that the promise rests on."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from coeffs.entry.fields import (
    MAX_STEPS,
    Count,
    Figures,
    Limits,
    Name,
    Positive,
    Record,
    Sha256,
    Steps,
)
from coeffs.entry.plan import Plan
from coeffs.entry.provenance import Protocol, Source
from coeffs.errors import EntryError

EXACT = "exact"  # the tier without a cache; it needs no certificate
# What a limit says of a sample against the uncached one, by the measure's name.
LIMITS = {
    "psnr_db": "PSNR >= {:g} dB",
    "snr_db": "SNR >= {:g} dB",
    "ssim": "SSIM >= {:g}",
    "lpips": "LPIPS <= {:g}",
    "rel_l2": "relative error <= {:g}",
    "latent_rel_l2": "latent error <= {:g}",
}

Share = Annotated[float, Limits(0, 1)]


@dataclass(frozen=True, kw_only=True)
class Certificate(Record):
    """At most ``risk`` of prompts miss a limit under this policy, in the settings of ``protocol``.

    Attributes:
        limits: Measure -> limit; a prompt misses when any of its samples misses one, or is broken.
        confidence: That this certificate and all others of the same ``tests`` are true together.
        tests: How many sequences of tests the confidence is shared by: policies times tiers.
        prompts_sha256: Of the prompts' ids and seeds.
        figures: Mean of every measure.
        source: Device and versions, and when.
    """

    tier: Name
    policy: Literal["plan", "gate", "fewer_steps"]
    plan: Plan | None = None
    threshold: Positive | None = None
    limits: dict[Name, float]
    risk: Share
    confidence: Share
    tests: Steps
    prompts: Count
    missed: Count
    broken: Count = 0
    prompt_set: str
    prompts_sha256: Sha256
    computed_steps: Annotated[float, Limits(1, MAX_STEPS)]
    num_steps: Steps
    speedup: Positive | None = None
    figures: Figures = None
    protocol: Protocol
    source: Source = field(default_factory=Source)

    def _check(self) -> None:
        if self.tier == EXACT:
            raise EntryError(f"{EXACT} is the tier without a cache: use another name", "tier")
        if not self.limits or not set(self.limits) <= set(LIMITS):
            raise EntryError(f"expected limits on some of {', '.join(LIMITS)}", "limits")
        given = (self.plan is not None, self.threshold is not None)
        if given != (self.policy == "plan", self.policy == "gate"):
            raise EntryError(
                "a plan belongs to the policy plan, a threshold to gate", "policy"
            )
        if chance(self.missed, self.prompts, self.risk) > (1 - self.confidence) / self.tests:
            raise EntryError(
                f"{self.missed} misses of {self.prompts} prompts do not prove the risk: certify again",
                "missed",
            )

    @property
    def promise(self) -> str:
        """The promise, the policy that keeps it, and what that rests on, in words."""
        return (
            f"{self.tier}: {limits_text(self.limits)} for {100 - 100 * self.risk:.4g} % of all prompts by {self.how} "
            f"(confidence {self.confidence:g}, {self.missed} of {self.prompts} prompts missed it)"
        )

    @property
    def how(self) -> str:
        """The policy in words."""
        if self.policy == "fewer_steps":
            return f"num_inference_steps={self.computed_steps:g} without a cache"
        policy = "plan" if self.threshold is None else f"gate at threshold {self.threshold:g}"
        return f"{policy}, {self.computed_steps:.3g} of {self.num_steps} steps"

    @property
    def factor(self) -> float:
        """How many times as fast as uncached: measured, or by steps where no time was taken."""
        return self.speedup or self.num_steps / self.computed_steps


def limits_text(limits: Mapping[str, float]) -> str:
    """Limits in words."""
    return " and ".join(LIMITS[name].format(limit) for name, limit in limits.items())


def chance(missed: int, prompts: int, share: float) -> float:
    """P(Bin(prompts, share) <= missed): how likely so few misses are if ``share`` of all prompts miss."""
    if missed >= prompts or not 0 < share < 1:
        return 1.0
    total = 0.0
    for k in range(missed + 1):
        ways = math.lgamma(prompts + 1) - math.lgamma(k + 1) - math.lgamma(prompts - k + 1)
        total += math.exp(ways + k * math.log(share) + (prompts - k) * math.log1p(-share))
    return total


def of_tier(certificates: Iterable[Certificate], tier: str) -> list[Certificate]:
    """Those of a tier, caches first, and the fastest first of both."""
    return sorted(
        (one for one in certificates if one.tier == tier),
        key=lambda one: (one.policy == "fewer_steps", -one.factor),
    )
