"""The gate: cases to follow in the head, properties that always hold, and the published rules told anew."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from coeffs.entry.polynomial import Polynomial
from runtime import Decision, FixedSchedule, Gate, GateConfig, InvalidSetting
from runtime.decide.gate import KINDS

IDENTITY = Polynomial((1.0, 0.0))


def kinds(gate: Gate, xs: list[float | None], num_steps: int | None = None) -> list[str]:
    return [
        gate.step(x, step=t, num_steps=num_steps or len(xs)).kind for t, x in enumerate(xs)
    ]


def letters(gate: Gate, xs: list[float | None]) -> str:
    return "".join("S" if kind == "skipped" else "C" for kind in kinds(gate, xs))


# -- cases to follow in the head --------------------------------------------------------------------------------------


def test_predictions_accumulate_until_the_threshold() -> None:
    gate = Gate(IDENTITY, GateConfig(threshold=0.5, end=0))
    found = [
        gate.step(x, step=t, num_steps=6)
        for t, x in enumerate([None, 0.25, 0.125, 0.25, 0.375, 0.25])
    ]
    assert found == [
        Decision("first"),
        Decision("skipped", 0.25, 0.25, 0.25),
        Decision("skipped", 0.125, 0.125, 0.375),
        Decision("computed", 0.25, 0.25, 0.625),
        Decision("skipped", 0.375, 0.375, 0.375),
        Decision("computed", 0.25, 0.25, 0.625),
    ]


def test_sum_that_reaches_the_threshold_computes() -> None:
    assert kinds(Gate(IDENTITY, GateConfig(threshold=0.5, end=0)), [None, 0.25, 0.25]) == [
        "first",
        "skipped",
        "computed",
    ]


def test_coefficients_are_highest_power_first() -> None:
    """2 x^2 + 1 at 0.5 is 1.5; read the other way round, x^2 + 2, it would be 2.25."""
    gate = Gate(Polynomial((2.0, 0.0, 1.0)), GateConfig(threshold=2.0, end=0))
    gate.step(None, step=0, num_steps=2)
    assert gate.step(0.5, step=1, num_steps=2).predicted == 1.5


def test_window_as_counts_and_as_fractions() -> None:
    xs = [None] + [0.0] * 9
    counts = Gate(IDENTITY, GateConfig(threshold=1.0, start=3, end=2))
    fractions = Gate(IDENTITY, GateConfig(threshold=1.0, start=0.25, end=0.2))
    assert letters(counts, xs) == letters(fractions, xs) == "CCCSSSSSCC"


def test_forced_steps_clear_the_sum() -> None:
    gate = Gate(IDENTITY, GateConfig(threshold=0.5, start=2, end=0))
    assert gate.step(None, step=0, num_steps=4).kind == "first"
    assert gate.step(0.4, step=1, num_steps=4) == Decision("forced", 0.4)
    assert gate.step(0.4, step=2, num_steps=4).accumulated == 0.4


def test_cap_on_skips_in_a_row() -> None:
    gate = Gate(IDENTITY, GateConfig(threshold=9.0, max_skips=2, end=0))
    assert (
        kinds(gate, [None] + [0.1] * 6)
        == ["first"] + ["skipped", "skipped", "streak_cap"] * 2
    )


def test_domain_is_clamped_below_and_refused_above() -> None:
    gate = Gate(Polynomial((1.0, 0.0), (0.2, 0.4)), GateConfig(threshold=0.5, end=0))
    gate.step(None, step=0, num_steps=9)
    assert gate.step(0.1, step=1, num_steps=9) == Decision("skipped", 0.1, 0.2, 0.2)
    assert gate.step(0.4001, step=2, num_steps=9) == Decision("above_domain", 0.4001)
    assert gate.step(0.2, step=3, num_steps=9).accumulated == 0.2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_change_computes(bad: float) -> None:
    gate = Gate(IDENTITY, GateConfig(threshold=9.0, end=0))
    assert kinds(gate, [None, 0.1, bad, 0.1]) == [
        "first",
        "skipped",
        "non_finite",
        "skipped",
    ]


def test_overflowing_prediction_computes() -> None:
    gate = Gate(Polynomial((1e300, 0.0, 0.0)), GateConfig(threshold=9.0, end=0))
    assert kinds(gate, [None, 1e10]) == ["first", "non_finite"]


def test_nothing_to_compare_with_computes() -> None:
    gate = Gate(IDENTITY, GateConfig(threshold=9.0, end=0))
    assert kinds(gate, [None, 0.1, None, 0.1]) == [
        "first",
        "skipped",
        "shape_changed",
        "skipped",
    ]


@pytest.mark.parametrize(
    ("rule", "pattern"), [("clamp", "CSSSC"), ("signed", "CSSSS"), ("abs", "CSSCS")]
)
def test_sign_rules(rule: str, pattern: str) -> None:
    """Predictions 0.2, -0.2, 0.2, 0.2 against 0.5: sums 0.2 0.2 0.4 0.6 / 0.2 0.0 0.2 0.4 / 0.2 0.4 0.6 0.2."""
    polynomial = Polynomial((-2.0, 0.4), sign_rule=rule)  # 0.2 at 0.1, -0.2 at 0.3
    xs = [None, 0.1, 0.3, 0.1, 0.1]
    assert letters(Gate(polynomial, GateConfig(threshold=0.5, end=0)), xs) == pattern


def test_reset_forgets_sum_and_streak() -> None:
    gate = Gate(IDENTITY, GateConfig(threshold=0.5, end=0, max_skips=2))
    first = kinds(gate, [None, 0.2, 0.2, 0.2])
    gate.reset()
    assert kinds(gate, [None, 0.2, 0.2, 0.2]) == first


def test_window_needs_the_length_of_the_schedule() -> None:
    gate = Gate(IDENTITY, GateConfig(threshold=0.5))
    gate.step(None, step=0, num_steps=None)
    with pytest.raises(
        InvalidSetting, match=r"num_steps=\.\.\., or start as a count and end=0"
    ):
        gate.step(0.1, step=1, num_steps=None)


@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": -0.1},
        {"threshold": math.nan},
        {"threshold": math.inf},
        {"threshold": "0.1"},
        {"threshold": True},
        {"threshold": 0.1, "start": -1},
        {"threshold": 0.1, "start": 1.5},
        {"threshold": 0.1, "end": math.nan},
        {"threshold": 0.1, "end": True},
        {"threshold": 0.1, "max_skips": 0},
        {"threshold": 0.1, "max_skips": 1.0},
    ],
)
def test_unusable_settings_are_refused(settings: dict) -> None:
    with pytest.raises(InvalidSetting, match="expected"):
        GateConfig(**settings)


def test_plan_is_followed_and_its_length_is_checked() -> None:
    plan = FixedSchedule("CSSC")
    assert [plan.step(None, step=t, num_steps=4).skip for t in range(4)] == [
        False,
        True,
        True,
        False,
    ]
    with pytest.raises(InvalidSetting, match="schedule of 4 steps on a run of 5"):
        plan.step(None, step=1, num_steps=5)
    with pytest.raises(InvalidSetting, match="step 5 of a schedule of 4"):
        plan.step(None, step=4, num_steps=None)


@pytest.mark.parametrize("plan", ["", "SC", "CXS", "cs"])
def test_unusable_plans_are_refused(plan: str) -> None:
    with pytest.raises(InvalidSetting, match="the first one C"):
        FixedSchedule(plan)


# -- properties -------------------------------------------------------------------------------------------------------

changes = st.one_of(st.floats(0, 3), st.just(math.nan), st.just(math.inf), st.none())
coefficients = st.lists(st.floats(-5, 5), min_size=1, max_size=5)
domains = st.one_of(st.none(), st.tuples(st.floats(0, 0.5), st.floats(0.75, 2)))
polynomials = st.builds(
    Polynomial, coefficients, domains, st.sampled_from(["clamp", "signed", "abs"])
)
windows = st.one_of(st.integers(0, 5), st.floats(0, 1))
configs = st.builds(
    GateConfig,
    threshold=st.floats(0, 4),
    start=windows,
    end=windows,
    max_skips=st.one_of(st.none(), st.integers(1, 4)),
    compat=st.booleans(),
)


@settings(deadline=None)
@given(polynomials, configs, st.lists(changes, min_size=1, max_size=30))
def test_what_never_happens(
    polynomial: Polynomial, config: GateConfig, xs: list[float | None]
) -> None:
    gate, streak, total = Gate(polynomial, config), 0, len(xs)
    for step, x in enumerate(xs):
        known = gate.known(step=step, num_steps=total)
        decision = gate.step(x, step=step, num_steps=total)
        assert decision.kind in KINDS
        assert (
            decision.kind == known.kind
            if known is not None
            else not decision.skip or x is not None
        )
        streak = streak + 1 if decision.skip else 0
        if not decision.skip:
            continue
        assert config.threshold > 0
        assert step > 0
        assert math.isfinite(x)
        assert not config.forced(step, total)
        assert decision.accumulated < config.threshold
        if config.compat:
            assert step < total - 1
        else:
            assert not polynomial.above_domain(x)
            assert config.max_skips is None or streak <= config.max_skips


@settings(deadline=None)
@given(polynomials, st.lists(changes, min_size=1, max_size=30))
def test_threshold_zero_computes_every_step(
    polynomial: Polynomial, xs: list[float | None]
) -> None:
    for compat in (False, True):
        assert letters(
            Gate(polynomial, GateConfig(threshold=0, end=0, compat=compat)), xs
        ) == "C" * len(xs)


@settings(deadline=None)
@given(polynomials, configs, st.lists(changes, min_size=1, max_size=20))
def test_asking_what_is_known_changes_nothing(
    polynomial: Polynomial, config: GateConfig, xs: list
) -> None:
    asked, unasked = Gate(polynomial, config), Gate(polynomial, config)
    for step, x in enumerate(xs):
        for _ in range(2):
            asked.known(step=step, num_steps=len(xs))
        assert repr(asked.step(x, step=step, num_steps=len(xs))) == repr(
            unasked.step(x, step=step, num_steps=len(xs))
        )


# -- compatibility mode against the published rules, told from their descriptions -------------------------------------

finite = st.lists(st.floats(0, 0.6), min_size=1, max_size=40)
FLUX = [4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01]


def value(high_to_low: list[float], x: float) -> float:
    degree = len(high_to_low) - 1
    return sum(c * x ** (degree - power) for power, c in enumerate(high_to_low))


def ali_vilab(high_to_low: list[float], threshold: float, xs: list[float]) -> str:
    """TeaCache for FLUX as its authors describe it.

    The first and the last step always compute and set the sum to zero. Every other step adds the polynomial's value,
    negative ones too, at the change since the previous step; below the threshold it is skipped, else it computes and
    the sum is zero again.
    """
    plan, total = "", 0.0
    for step, x in enumerate(xs):
        if step in (0, len(xs) - 1):
            plan, total = plan + "C", 0.0
            continue
        total += value(high_to_low, x)
        if total < threshold:
            plan += "S"
        else:
            plan, total = plan + "C", 0.0
    return plan


def vllm_omni(high_to_low: list[float], threshold: float, xs: list[float]) -> str:
    """The same rule in vLLM-Omni: what is added is the polynomial's absolute value."""
    plan, total = [], 0.0
    for step, x in enumerate(xs):
        forced = step == 0 or step == len(xs) - 1
        total = 0.0 if forced else total + abs(value(high_to_low, x))
        compute = forced or not total < threshold
        plan.append("C" if compute else "S")
        total = 0.0 if compute else total
    return "".join(plan)


@pytest.mark.parametrize(("rule", "published"), [("signed", ali_vilab), ("abs", vllm_omni)])
@settings(deadline=None, max_examples=300)
@given(xs=finite, own=st.one_of(st.just(FLUX), coefficients), threshold=st.floats(0.01, 2))
def test_compatibility_decides_as_published(
    rule: str, published, xs: list[float], own: list, threshold: float
):
    """A window, a cap and a domain beside it do not count."""
    polynomial = Polynomial(tuple(own), (0.1, 0.2), rule)
    gate = Gate(
        polynomial,
        GateConfig(threshold=threshold, start=4, end=3, max_skips=1, compat=True),
    )
    near = {published(own, threshold * (1 + edge), xs) for edge in (-1e-9, 0, 1e-9)}
    assume(len(near) == 1)  # on the very edge the order of summation decides
    assert letters(gate, xs) == published(own, threshold, xs)


def test_compatibility_on_a_trajectory_of_the_published_polynomial() -> None:
    """28 changes that fall and rise as FLUX's do, at the threshold that its authors recommend for a speed-up of 2."""
    xs = [0.03 + 0.12 * abs(math.cos(3 * step / 28)) for step in range(28)]
    gate = Gate(
        Polynomial(tuple(FLUX), sign_rule="signed"), GateConfig(threshold=0.6, compat=True)
    )
    found = letters(gate, xs)
    assert found == ali_vilab(FLUX, 0.6, xs)
    assert found[0] == found[-1] == "C"
    assert 5 < found.count("S") < 23
