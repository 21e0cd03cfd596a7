"""What the forms of plans and of magnitude ratios share: which plan, which forecast, and ratios crafted to run it."""

from collections.abc import Sequence
from itertools import groupby

from coeffs.engines.releases import Release
from coeffs.engines.setting import Request, checked
from coeffs.entry.schema import Entry, Plan
from coeffs.errors import EngineError

# MagCache skips while the accumulated |1 - product of ratios| stays below its threshold and the run below its cap.
# A ratio of 1 adds nothing, one of 100 adds 99: more than any threshold in use (0.06 to 0.24).
SKIP, COMPUTE = 1.0, 100.0


def planned(request: Request, engine: str) -> tuple[Plan, list[str]]:
    """The plan to export and the notes that open the form, or a refusal.

    Raises:
        EngineError: No plan, several, letters that no engine can run, another number of steps than the entry's, or two
            denoisers, which every engine counts from 0 each.
    """
    entry = request.entry
    release, notes = checked(request, engine)
    plan = _plan(entry, request.schedule)
    if len(entry.experts) > 1:
        raise EngineError(
            f"{entry.label} has {' and '.join(entry.experts)}: {engine} counts the steps of each from 0, and the plan "
            "does not say where the second begins; apply it with runtime.apply_tea_cache"
        )
    computed = plan.schedule.count("C")
    notes.append(f"{computed} of {len(plan.schedule)} steps compute: {plan.schedule}")
    return plan, notes + _forecast_notes(plan, release)


def _plan(entry: Entry, schedule: str | None) -> Plan:
    plans = {plan.schedule: plan for plan in entry.plans or ()}
    if schedule is None:
        if len(plans) != 1:
            known = f"has the plans {', '.join(plans)}" if plans else "has no plan"
            raise EngineError(
                f"{entry.label} {known}: give one with --schedule CCSC..., one letter per step"
            )
        schedule = next(iter(plans))
    if not schedule.startswith("C") or set(schedule) != {"C", "S"}:
        raise EngineError(
            f"schedule {schedule[:40]!r}: expected letters C and S that begin with C, and a step to skip"
        )
    if schedule in plans:
        return plans[schedule]
    steps = entry.protocol.num_steps
    if steps not in (None, len(schedule)):
        raise EngineError(
            f"schedule of {len(schedule)} steps: {entry.label} was measured with {steps}; give one letter for each"
        )
    return Plan(schedule=schedule)


# Longest run of skips that TaylorSeer of an order bridges better than reuse does, measured through cache-dit on the
# embedded model: at runs of 4 order 1 equals reuse (33.1 and 33.3 dB) and order 2 beats it (35.5), at runs of 5 reuse
# beats both (31.2 against 25.9 and 28.5).
LONGEST_RUN = {1: 3, 2: 4}


def taylor_order(plan: Plan, release: Release) -> int:
    """The order of TaylorSeer that stands in for the plan's forecast; 0 for reuse."""
    if plan.forecast in (None, "reuse") or not release.forecast:
        return 0
    longest = max(runs(plan.schedule, "S"))
    return release.forecast if longest <= LONGEST_RUN[release.forecast] else 0


def _forecast_notes(plan: Plan, release: Release) -> list[str]:
    ours = plan.forecast or "reuse"
    order = taylor_order(plan, release)
    engines = f"TaylorSeer of order {order}" if order else "reuse of the residual"
    if ours == "reuse":
        return []
    of = f" of the {plan.forecast_of}" if plan.forecast_of else ""
    return [
        f"forecast: {engines} in place of ours ({ours}{of}); the entry's figures were measured with ours"
    ]


def mask(plan: Plan) -> list[int]:
    """1 for a computed step, 0 for a skipped one."""
    return [int(letter == "C") for letter in plan.schedule]


def letters(steps: object, what: str) -> str:
    """A mask as a schedule."""
    if not isinstance(steps, list) or not steps or any(step not in (0, 1) for step in steps):
        raise EngineError(f"{what}: expected a list of 0 and 1, one per step")
    return "".join("SC"[step] for step in steps)


def runs(schedule: str, letter: str) -> list[int]:
    """Lengths of the runs of one letter, in order."""
    return [len(list(run)) for key, run in groupby(schedule) if key == letter]


def crafted(plan: Plan) -> list[float]:
    """Magnitude ratios with which MagCache executes the plan, at a cap of its longest run of skips."""
    return [COMPUTE if letter == "C" else SKIP for letter in plan.schedule]


def is_crafted(ratios: Sequence[float]) -> bool:
    return set(ratios) <= {SKIP, COMPUTE} and COMPUTE in ratios


def schedule_of(ratios: Sequence[float]) -> str:
    """The schedule that crafted ratios run."""
    return "".join("C" if ratio == COMPUTE else "S" for ratio in ratios)


def wants_plan(request: Request) -> bool:
    """Whether a MagCache form is to run a plan: one is named, or the entry has no ratios but plans."""
    recorded = any(expert.mag_ratios for expert in request.entry.experts.values())
    return request.schedule is not None or (not recorded and bool(request.entry.plans))


def recorded_ratios(entry: Entry, expert: str) -> dict[str, tuple[float, ...]]:
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
    first = [entry.experts[expert].recommended, "cond"]
    order = [name for name in first if name in ratios]
    return {name: ratios[name] for name in dict.fromkeys([*order, *ratios]) if name is not None}
