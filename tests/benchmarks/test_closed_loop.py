"""The table of plans and rivals where parts of it cannot be run."""

from types import SimpleNamespace

from benchmarks.closed_loop import RIVALS
from calibrate.planning import closed_loop
from calibrate.planning.trajectories import NoSolver
from calibrate.verifying.lineup import POLICIES, entered


def test_without_a_solver_to_watch_the_fitted_rival_is_refused(tmp_path, monkeypatch):
    """Bug: the benchmark ended."""

    def unwatchable(*args):
        raise NoSolver("no scheduler whose steps could be watched")

    assert "uniform-fitted" in RIVALS
    monkeypatch.setattr(closed_loop, "Runner", unwatchable)
    lineup = SimpleNamespace(
        run=SimpleNamespace(path=tmp_path),
        num_steps=10,
        budgets=[5],
        entry=None,
        bench=SimpleNamespace(case=None, progress=False),
        say=print,
    )
    settings, refused = entered(lineup, ["uniform-fitted"])
    assert not settings and "no scheduler" in refused[POLICIES["uniform-fitted"].label]
