"""What the forms of plans and of magnitude ratios share: which plan, which forecast, and ratios crafted to run it."""

from dataclasses import dataclass
from itertools import groupby
from typing import Annotated

from coeffs.engines.releases import two_calls
from coeffs.engines.setting import Carried, Request, certified, opening
from coeffs.engines.text import Form, value_of
from coeffs.entry.fields import Limits, Numbers, Text
from coeffs.entry.schema import Entry, Plan
from coeffs.errors import EngineError

# MagCache skips while the accumulated |1 - product of ratios| stays below its threshold and the run below its cap.
# A ratio of 1 adds nothing, one of 100 adds 99: more than any threshold in use (0.06 to 0.24).
SKIP, COMPUTE = 1.0, 100.0

# Longest run of skips that TaylorSeer of an order bridges better than reuse does, measured through cache-dit on the
# embedded model: at runs of 4 order 1 equals reuse (33.1 and 33.3 dB) and order 2 beats it (35.5), at runs of 5 reuse
# beats both (31.2 against 25.9 and 28.5).
LONGEST_RUN = {1: 3, 2: 4}

# cache-dit computes these blocks on every step to compare them; a static mask needs no comparison, and 1 is the least.
ONE_BLOCK = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0}


@dataclass(frozen=True)
class Planned:
    """The schedule to export, and the order of TaylorSeer in place of its forecast (0: reuse)."""

    schedule: str
    order: int

    @property
    def mask(self) -> list[int]:
        """1 for a computed step, 0 for a skipped one."""
        return [int(letter == "C") for letter in self.schedule]

    @property
    def taylorseer(self) -> Form:
        """cache-dit's settings for the forecast; none for reuse."""
        return (
            {"enable_taylorseer": True, "taylorseer_order": self.order} if self.order else {}
        )

    def runs(self, letter: str) -> list[int]:
        """Lengths of the runs of one letter, in order."""
        return [len(list(run)) for key, run in groupby(self.schedule) if key == letter]


def planned(request: Request) -> Planned:
    """The plan to export, or a refusal.

    Raises:
        EngineError: No plan, several, letters that no engine can run, another number of steps than the entry's, or two
            denoisers, which every engine counts from 0 each.
    """
    entry, engine, highest = request.entry, request.engine, request.facts.forecast
    opening(request)
    plan = plan_of(entry, request.schedule)
    if len(entry.experts) > 1:
        raise EngineError(
            f"{entry.label} has {' and '.join(entry.experts)}: {engine} counts the steps of each from 0, and the plan "
            "does not say where the second begins; apply it with runtime.apply_tea_cache"
        )
    schedule, ours = plan.schedule, plan.forecast or "reuse"
    request.notes.append(
        f"{plan.computed_steps} of {len(schedule)} steps compute: {schedule}"
    )
    order = 0
    if ours != "reuse":
        bridged = "S" * (LONGEST_RUN.get(highest, 0) + 1) not in schedule
        order = highest if bridged else 0
        theirs = f"TaylorSeer of order {order}" if order else "reuse of the residual"
        of = f" of the {plan.forecast_of}" if plan.forecast_of else ""
        request.notes.append(
            f"forecast: {theirs} in place of ours ({ours}{of}); the entry's figures were measured with ours"
        )
    certified(request, schedule)
    return Planned(schedule, order)


def plan_of(entry: Entry, schedule: Text) -> Plan:
    """The entry's plan of this schedule, its only one, or a plan of a schedule that it does not have."""
    plans = {plan.schedule: plan for plan in entry.plans or ()}
    if schedule is None:
        if len(plans) != 1:
            known = f"has the plans {', '.join(plans)}" if plans else "has no plan"
            raise EngineError(
                f"{entry.label} {known}: give one with --schedule CCSC..., one letter per step"
            )
        (schedule,) = plans
    if not schedule.startswith("C") or set(schedule) != {"C", "S"}:
        raise EngineError(
            f"schedule {schedule[:40]!r}: expected letters C and S that begin with C, and a step to skip"
        )
    steps = entry.protocol.num_steps
    if schedule not in plans and steps not in (None, len(schedule)):
        raise EngineError(
            f"schedule of {len(schedule)} steps: {entry.label} was measured with {steps}; give one letter for each"
        )
    return plans.get(schedule) or Plan(schedule=schedule)


def guidance(request: Request) -> Form:
    """cache-dit's setting for guidance in two calls a step; without it each call counts as a step."""
    separate = two_calls(request.entry)
    if separate is None:
        request.notes.append(
            "whether guidance takes two calls a step is not known: the engine's default for the model holds"
        )
        return {}
    return {"enable_separate_cfg": separate}


def read_mask(form: Form) -> Carried:
    mask = value_of(form, "steps_computation_mask", tuple[Annotated[int, Limits(0, 1)], ...])
    return Carried(schedule="".join("SC"[step] for step in mask))


# --- magnitude ratios -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratios:
    """What a MagCache form holds: expert -> branch -> ratios, the branch to use for all of them first.

    Attributes:
        cap: Longest run of skips; None where the entry does not say.
        crafted: Whether the ratios are crafted to execute a plan.
    """

    experts: dict[str, dict[str, Numbers]]
    cap: int | None
    crafted: bool

    @property
    def only(self) -> dict[str, Numbers]:
        """Branch -> ratios for an engine with one slot."""
        if len(self.experts) > 1:
            raise EngineError(
                f"ratios for {' and '.join(self.experts)}, the engine has one slot: take one with one configuration "
                "per denoiser (diffusers-magcache)"
            )
        (branches,) = self.experts.values()
        return branches


def wants_plan(entry: Entry, schedule: Text) -> bool:
    """Whether a MagCache form is to run a plan: one is named, or the entry has no ratios but plans."""
    recorded = any(expert.mag_ratios for expert in entry.experts.values())
    return schedule is not None or (not recorded and bool(entry.plans))


def mag_cache(request: Request) -> Ratios:
    """The recorded ratios, or ratios with which MagCache executes the plan at a cap of its longest run of skips."""
    entry = request.entry
    if wants_plan(entry, request.schedule):
        plan = planned(request)
        ratios = tuple(COMPUTE if letter == "C" else SKIP for letter in plan.schedule)
        experts = {"transformer": {"pooled": ratios}}
        return Ratios(experts, max(plan.runs("S")), crafted=True)
    opening(request)
    experts = {name: _recorded(entry, name) for name in entry.experts}
    return Ratios(experts, entry.max_skips, crafted=False)


def _recorded(entry: Entry, expert: str) -> dict[str, Numbers]:
    """Branch -> ratios of one denoiser, the recommended or conditional branch first."""
    ratios = entry.experts[expert].mag_ratios
    if not ratios:
        raise EngineError(
            f"{entry.label} has no mag_ratios for {expert}: record it again, they come with the pairs"
        )
    counts = sorted({len(values) for values in ratios.values()})
    if len(counts) > 1:
        raise EngineError(
            f"{entry.label}: the branches of {expert} have ratios for {counts[0]} and {counts[-1]} steps, expected as "
            "many for each: record it again"
        )
    first = [entry.experts[expert].recommended, "cond", *ratios]
    return {name: ratios[name] for name in first if name in ratios}


def read_ratios(experts: dict[str, dict[str, Numbers]], cap: int | None) -> Carried:
    """Ratios read from a form: the plan that crafted ones execute, or recorded ones."""
    lists = [ratios for branches in experts.values() for ratios in branches.values()]
    if len(lists) == 1 and COMPUTE in lists[0] and set(lists[0]) <= {SKIP, COMPUTE}:
        return Carried(
            schedule="".join("C" if ratio == COMPUTE else "S" for ratio in lists[0])
        )
    return Carried(mag_ratios=experts, max_skips=cap)
