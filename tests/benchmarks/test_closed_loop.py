"""The table of plans and rivals where parts of it cannot be run."""

from types import SimpleNamespace

from benchmarks.closed_loop import RIVALS
from calibrate.verifying.lineup import POLICIES, entered


def test_without_a_solver_to_watch_the_fitted_rival_is_refused(tmp_path):
    """Bug: the benchmark ended."""
    assert "uniform-fitted" in RIVALS
    lineup = SimpleNamespace(
        run=SimpleNamespace(path=tmp_path), num_steps=10, budgets=[5], entry=None
    )
    lineup.planned = lambda label, schedule: [schedule(5)]
    settings, refused = entered(lineup, ["uniform-fitted"], print)
    assert not settings and "calibrate plan" in refused[POLICIES["uniform-fitted"].label]
