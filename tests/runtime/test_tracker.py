"""Which trajectory a call belongs to, with plain numbers and no pipeline."""

import weakref

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.decide.tracker import MOST_BRANCHES, CallInfo, Position, Tracker
from runtime.watch.scheduler import SchedulerClock

COND, UNCOND, THIRD = frozenset({"prompt"}), frozenset({"negative"}), frozenset({"image"})


def call(step: int | None = None, schedule: object = 1, **info: object) -> CallInfo:
    """A call under a scheduler that counts its steps."""
    return CallInfo(schedule=schedule, step_index=step, **info)


def timed(time: float | None, **info: object) -> CallInfo:
    """A call of which only the timestep is known."""
    return CallInfo(timestep=lambda: None if time is None else (time, time), **info)


def follow(*calls: CallInfo, tracker: Tracker | None = None) -> list[Position]:
    tracker = tracker or Tracker()
    return [tracker.locate(info) for info in calls]


def short(positions: list[Position]) -> list[str]:
    """``branch:step`` of each call, ``*`` where a generation begins, ``!`` where nothing may be reused."""
    return [
        f"{p.branch}:{p.step}{'*' if p.new_generation else ''}{'' if p.consecutive else '!'}"
        for p in positions
    ]


# -- branches that the pipeline names ---------------------------------------------------------------------------------


def test_named_branches_are_kept_apart() -> None:
    calls = [call(step, context=name) for step in range(3) for name in ("cond", "uncond")]
    assert short(follow(*calls)) == [
        "cond:0*!",
        "uncond:0!",
        "cond:1",
        "uncond:1",
        "cond:2",
        "uncond:2",
    ]


def test_guidance_that_stops_and_starts_midway() -> None:
    steps = [
        (0, "cond"),
        (0, "uncond"),
        (1, "cond"),
        (2, "cond"),
        (2, "uncond"),
        (3, "cond"),
        (3, "uncond"),
    ]
    found = short(follow(*(call(step, context=name) for step, name in steps)))
    assert found == [
        "cond:0*!",
        "uncond:0!",
        "cond:1",
        "cond:2",
        "uncond:2!",
        "cond:3",
        "uncond:3",
    ]


def test_timestep_is_not_read_where_the_scheduler_counts() -> None:
    def waits() -> None:
        raise AssertionError("this would wait for the device")

    follow(*(call(step, context="cond", timestep=waits) for step in range(3)))


def test_timestep_is_read_once_a_call_where_nothing_counts_the_steps() -> None:
    """Bug: twice, and on a GPU the host waits each time."""
    reads = []

    def read(time: float) -> tuple[float, float]:
        reads.append(time)
        return time, time

    follow(
        *(CallInfo(timestep=lambda time=time: read(time)) for time in (900.0, 600.0, 300.0))
    )
    assert reads == [900.0, 600.0, 300.0]


# -- unnamed branches -------------------------------------------------------------------------------------------------


def test_unnamed_branches_are_told_by_their_conditioning() -> None:
    calls = [call(step, conditioning=c) for step in range(3) for c in (COND, UNCOND, THIRD)]
    assert [p.branch for p in follow(*calls)] == ["branch0", "branch1", "branch2"] * 3


def test_order_of_the_calls_may_change() -> None:
    calls = [call(0, conditioning=COND), call(0, conditioning=UNCOND)]
    calls += [call(step, conditioning=c) for step in (1, 2) for c in (UNCOND, COND)]
    assert [p.branch for p in follow(*calls)] == [
        "branch0",
        "branch1",
        "branch1",
        "branch0",
        "branch1",
        "branch0",
    ]


def test_first_branch_that_is_left_out_is_not_taken_for_another() -> None:
    """Steps 0 and 1 call both branches, step 2 only the second one: it must not get the first one's residual."""
    calls = [call(step, conditioning=c) for step in (0, 1) for c in (COND, UNCOND)] + [
        call(2, conditioning=UNCOND)
    ]
    assert short(follow(*calls))[-1] == "branch1:2"


def test_indistinguishable_branches_go_by_the_order_of_their_calls() -> None:
    """Embeddings that are made anew for every call have no identity in common."""
    calls = [
        call(step, conditioning=frozenset({(step, number)}))
        for step in range(4)
        for number in range(2)
    ]
    assert [p.branch for p in follow(*calls)] == ["branch0", "branch1"] * 4


def test_memory_that_another_tensor_takes_over_is_not_its_identity() -> None:
    """Embeddings made anew for every call may be given each other's memory; that must not swap the branches."""
    free = [np.zeros(4, np.float32) for _ in range(9)]

    def new() -> torch.Tensor:
        """A tensor in the memory that was freed last, as allocators like to give it."""
        memory = free.pop()
        view = memory.view()
        weakref.finalize(view, free.append, memory)
        return torch.from_numpy(view)

    clock, tracker, found = SchedulerClock(), Tracker(), []
    for time in (900.0, 600.0, 300.0, 100.0):
        texts = []
        for _ in range(2):
            texts.append(new())
            named = {"hidden_states": torch.zeros(1), "timestep": time}
            named["encoder_hidden_states"] = texts[-1]
            found.append(tracker.locate(clock.call_info(named, context=None)))
        while texts:
            texts.pop(0)
    assert [p.branch for p in found] == ["branch0", "branch1"] * 4
    assert all(p.consecutive for p in found[2:])


# -- generations ------------------------------------------------------------------------------------------------------


def test_new_schedule_is_a_new_generation() -> None:
    """Also when it begins where an interrupted one stopped, as image to image may."""
    found = follow(call(0), call(1), call(2, schedule=2), call(3, schedule=2))
    assert short(found) == ["branch0:0*!", "branch0:1", "branch0:2*!", "branch0:3"]


def test_step_that_falls_back_is_a_new_generation() -> None:
    assert short(follow(call(0), call(1), call(0), call(1)))[2:] == [
        "branch0:0*!",
        "branch0:1",
    ]


def test_new_schedule_without_step_counter_is_a_new_generation() -> None:
    """DDIM counts no steps. After an error in the first step the next generation begins at the same timestep."""
    calls = [
        CallInfo(schedule=s, timestep=lambda t=t: (t, t))
        for s, t in [(1, 900.0), (2, 900.0), (2, 800.0)]
    ]
    assert short(follow(*calls)) == ["branch0:0*!", "branch0:0*!", "branch0:1"]


def test_reset_forgets_everything() -> None:
    tracker = Tracker()
    follow(call(0), call(1), tracker=tracker)
    tracker.reset()
    assert short(follow(call(2), tracker=tracker)) == ["branch0:2*!"]


def test_timestep_that_turns_back_is_a_new_generation_whichever_way_it_runs() -> None:
    falling = [timed(t) for t in (900.0, 600.0, 300.0, 900.0, 600.0)]
    rising = [timed(t) for t in (0.0, 0.3, 0.6, 0.0, 0.3)]
    expected = ["branch0:0*!", "branch0:1", "branch0:2", "branch0:0*!", "branch0:1"]
    assert short(follow(*falling)) == short(follow(*rising)) == expected


def test_same_timestep_again_is_another_branch() -> None:
    calls = [timed(t, conditioning=c) for t in (900.0, 600.0) for c in (COND, UNCOND)]
    assert short(follow(*calls)) == ["branch0:0*!", "branch1:0!", "branch0:1", "branch1:1"]


def test_same_branch_at_the_same_timestep_is_another_evaluation() -> None:
    """Solvers of second order evaluate one timestep twice."""
    calls = [timed(t, conditioning=COND) for t in (900.0, 600.0, 600.0, 300.0, 300.0)]
    assert short(follow(*calls)) == [
        "branch0:0*!",
        "branch0:1",
        "branch0:2",
        "branch0:3",
        "branch0:4",
    ]


def test_nothing_known_at_all_is_one_trajectory() -> None:
    assert short(follow(*[timed(None)] * 3)) == ["branch0:0*!", "branch0:1", "branch0:2"]


# -- a scheduler in view that does not drive --------------------------------------------------------------------------


def test_scheduler_at_its_end_does_not_drive() -> None:
    """Another pipeline runs the shared denoiser after a finished generation; its own steps are told by the time."""
    calls = [
        call(4, num_steps=4, timestep=lambda t=t: (t, t), conditioning=c)
        for t in (900.0, 600.0, 300.0)
        for c in (COND, UNCOND)
    ]
    expected = [
        "branch0:0*!",
        "branch1:0!",
        "branch0:1",
        "branch1:1",
        "branch0:2",
        "branch1:2",
    ]
    assert short(follow(*calls)) == expected


def test_scheduler_that_stands_still_does_not_drive() -> None:
    calls = [
        call(2, context="cond", timestep=lambda t=t: (t, t)) for t in (900.0, 600.0, 300.0)
    ]
    assert short(follow(*calls))[1:] == ["cond:0*!", "cond:1"]


def test_scheduler_that_moves_again_drives() -> None:
    tracker = Tracker()
    follow(
        *(
            call(2, context="cond", timestep=lambda t=t: (t, t))
            for t in (900.0, 600.0, 300.0)
        ),
        tracker=tracker,
    )
    found = follow(
        *(call(step, schedule=2, context="cond") for step in (0, 1)), tracker=tracker
    )
    assert short(found) == ["cond:0*!", "cond:1"]


# -- whatever comes ---------------------------------------------------------------------------------------------------

infos = st.builds(
    lambda context, schedule, step, time, conditioning, num_steps: CallInfo(
        context=context,
        schedule=schedule,
        step_index=step,
        num_steps=num_steps,
        timestep=lambda: time and (time, time),
        conditioning=frozenset(conditioning),
    ),
    st.sampled_from([None, "cond", "uncond"]),
    st.sampled_from([None, 1, 2]),
    st.one_of(st.none(), st.integers(0, 5)),
    st.one_of(st.none(), st.sampled_from([1000.0, 700.0, 400.0, 100.0])),
    st.sets(st.integers(0, 3), max_size=2),
    st.sampled_from([None, 5]),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(infos, max_size=40))
def test_any_sequence_of_calls_is_located(calls: list[CallInfo]) -> None:
    """Never an error; what begins is never consecutive; two calls of one branch in a row are never of one step."""
    last: dict[str, int] = {}
    for info, position in zip(calls, follow(*calls), strict=True):
        if position.new_generation:
            last.clear()
            assert not position.consecutive
        assert position.step >= 0
        if info.context is not None:
            assert position.branch == info.context
        if position.consecutive:
            assert position.branch in last
        last[position.branch] = position.step
    assert len(last) <= max(MOST_BRANCHES, len(calls))


@settings(deadline=None, max_examples=200)
@given(
    branches=st.integers(1, 4),
    steps=st.integers(1, 8),
    named=st.booleans(),
    counted=st.booleans(),
    rises=st.booleans(),
    generations=st.integers(1, 3),
)
def test_regular_generations_are_followed(
    branches: int, steps: int, named: bool, counted: bool, rises: bool, generations: int
) -> None:
    calls, expected = [], []
    for generation in range(generations):
        for step in range(steps):
            for branch in range(branches):
                time = float(step if rises else steps - step)
                calls.append(
                    CallInfo(
                        context=f"branch{branch}" if named else None,
                        schedule=generation if counted else None,
                        step_index=step if counted else None,
                        timestep=lambda time=time: (time, time),
                        conditioning=frozenset({(generation, branch)}),
                    )
                )
                expected.append((f"branch{branch}", step, step == branch == 0, step > 0))
    if not counted and steps <= 2:
        calls, expected = (
            calls[: branches * steps],
            expected[: branches * steps],
        )  # no direction is known yet
    found = [(p.branch, p.step, p.new_generation, p.consecutive) for p in follow(*calls)]
    assert found == expected
