"""One way to run is described alike, whoever describes it."""

import coeffs
from calibrate.trials.setting import plan_setting


def test_a_plan_and_the_uniform_policies_describe_one_way_to_run_alike():
    plan = coeffs.Plan(schedule="CSCS", forecast="reuse", forecast_of="residual")
    assert plan_setting("x", plan).identity() == plan_setting("x", "CSCS").identity()
    assert plan_setting("x", "CSCS").identity() == {"schedule": "CSCS"}
    weights = ((1.0,), (1.5, -0.5))
    fitted = coeffs.Plan(
        schedule="CSCS", forecast="fitted", forecast_of="output", weights=weights
    )
    assert plan_setting("x", fitted).identity()["weights"] == {"1": [1.0], "3": [1.5, -0.5]}
