"""The table of plans and rivals where parts of it cannot be run."""

from types import SimpleNamespace

from benchmarks.closed_loop import UNIFORM_FITTED, fitted


def test_without_a_solver_to_watch_the_fitted_rival_is_refused():
    """Bug: the benchmark ended."""
    case = SimpleNamespace(session=SimpleNamespace(solver_is_replaceable=False))
    settings, refused = fitted(case, [5], None)
    assert not settings and "no scheduler" in refused[UNIFORM_FITTED]
