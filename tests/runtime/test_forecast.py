"""Forecasts: weights that a reader can check in the head, and what a skipped step makes of them."""

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st

from runtime import Forecast, InvalidSetting, apply_tea_cache
from runtime.decide.forecast import extrapolation

pytestmark = pytest.mark.slow

torch.set_num_threads(1)
SCHEDULE = "CCCSSCSS"


def test_weights_by_hand():
    assert Forecast().at(5, level=0.1, anchors=[0.3]) == [1.0]
    assert Forecast("linear").at(2, level=0.4, anchors=[0.6, 0.8]) == pytest.approx(
        [2.0, -1.0]
    )
    assert Forecast("quadratic").at(3, level=0.0, anchors=[1.0, 2.0, 3.0]) == pytest.approx(
        [3.0, -3.0, 1.0]
    )
    assert Forecast("linear").at(1, level=0.4, anchors=[0.6]) == [
        1.0
    ]  # one anchor: nothing to extrapolate from
    fitted = Forecast("fitted", {3: (1.5, -0.5)})
    assert fitted.kept_from(0) == 2
    assert fitted.at(3, level=0.0, anchors=[0.6, 0.8]) == [1.5, -0.5]
    assert fitted.at(4, level=0.0, anchors=[0.6, 0.8]) == [
        1.0
    ]  # a step without weights is reused


def test_fitted_weights_belong_to_the_planned_anchors():
    """Planned at step 4: computed at 1 and 0. Weights are for these alone; for others the newest is reused."""
    weights = {2: (1.5, -0.5), 3: (1.2,), 4: (1.6, -0.6)}
    fitted, bare = (
        Forecast("fitted", weights, schedule="CCSSSC"),
        Forecast("fitted", weights),
    )
    levels = [0.6, 0.8]
    assert (
        fitted.at(4, 0.0, levels, steps=[1, 0])
        == bare.at(4, 0.0, levels, steps=[1, 0])
        == [1.6, -0.6]
    )
    assert fitted.at(4, 0.0, levels, steps=[3, 1]) == [
        1.0,
        0.0,
    ]  # step 3 was computed as well
    assert bare.at(4, 0.0, levels, steps=[3, 1]) == [1.6, -0.6]
    assert fitted.at(4, 0.0, levels, steps=[1, -1]) == [1.0, 0.0]
    assert fitted.at(4, 0.0, levels[:1], steps=[1]) == [1.0]
    assert fitted.at(3, 0.0, levels, steps=[1, -1]) == [
        1.2
    ]  # the row of one looks at the newest alone
    assert fitted.at(3, 0.0, levels, steps=[2, 1]) == [1.0, 0.0]
    assert fitted.at(5, 0.0, levels, steps=[1, 0]) == [1.0]  # no weights: reused


def test_solvers_that_visit_a_level_twice_lower_the_order():
    assert extrapolation(0.2, [0.4, 0.4, 0.6]) == pytest.approx([2.0, 0.0, -1.0])


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=4, unique=True),
    st.integers(0, 60),
    st.data(),
)
def test_polynomials_of_the_order_are_forecast_exactly(levels, target, data):
    coefficients = data.draw(
        st.lists(st.integers(-5, 5), min_size=len(levels), max_size=len(levels))
    )

    def curve(level: float) -> float:
        return sum(c * (level / 50) ** power for power, c in enumerate(coefficients))

    weights = extrapolation(target / 50, [level / 50 for level in levels])
    forecast = sum(
        weight * curve(level) for weight, level in zip(weights, levels, strict=True)
    )
    scale = max(1.0, sum(abs(weight) for weight in weights))
    assert forecast == pytest.approx(curve(target), abs=1e-9 * scale * 50)


@pytest.mark.parametrize("of", ["residual", "output"])
@pytest.mark.parametrize("kind", ["reuse", "linear", "quadratic"])
@pytest.mark.parametrize("name", ["flux", "ltx2", "consisid", "z_image"])
def test_offloading_changes_nothing(name, kind, of):
    model = zoo.build(name)
    steps = list(zoo.trajectory(name, total=len(SCHEDULE)))
    results = []
    for offload in (False, True):
        with apply_tea_cache(
            model, schedule=SCHEDULE, forecast=kind, forecast_of=of, offload=offload
        ) as cache:
            results.append([zoo.run(model, kwargs) for kwargs in steps])
            assert cache.stats.pattern == SCHEDULE
    for one, other in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_output_forecast_is_what_its_weights_say():
    """Linear in the step where there are no sigmas: 2 v(t-1) - v(t-2); what is kept stays as it was."""
    model = zoo.build("flux")
    steps = list(zoo.trajectory("flux", total=4))
    plain = [zoo.run(model, kwargs)[0] for kwargs in steps]
    with apply_tea_cache(model, schedule="CCSS", forecast="linear", forecast_of="output"):
        found = []
        for kwargs in steps:
            output = zoo.run(model, kwargs)[0]
            found.append(output.clone())
            output.zero_()  # as a pipeline may
    torch.testing.assert_close(found[2], 2 * plain[1] - plain[0])
    torch.testing.assert_close(found[3], 3 * plain[1] - 2 * plain[0])


@pytest.mark.parametrize(
    "settings", [{"forecast": "cubic"}, {"forecast_of": "latents"}, {"branches": "alone"}]
)
def test_unknown_settings_are_refused(settings):
    model = zoo.build("flux")
    with pytest.raises(InvalidSetting, match="expected"):
        apply_tea_cache(model, schedule="CS", **settings)
    with pytest.raises(InvalidSetting, match="only fitted"):
        Forecast("linear", {1: (1.0,)})
    with pytest.raises(InvalidSetting, match="only fitted has one"):
        Forecast("linear", schedule="CS")
    other = Forecast("fitted", {1: (1.0,)}, schedule="CSC")
    with pytest.raises(InvalidSetting, match="fitted for CSC, the schedule is CSS"):
        apply_tea_cache(model, schedule="CSS", forecast=other)
