"""Asynchronous steps: contributions, staleness and its bound, who is told what when the run is over."""

import pytest

from server_trunk.async_steps import AsyncSteps, steps_of
from server_trunk.steps import Steps
from splitfl.config import build_config
from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import StepDone


def begun(*sessions: str, contributions: int = 1, max_staleness: int = 8, last: int = 0, deadline: float = 0.0) -> AsyncSteps:
    steps = AsyncSteps(
        clients=len(sessions), contributions=contributions, max_staleness=max_staleness, last=last, deadline=deadline
    )
    for session in sessions:
        assert steps.openings() == []
        steps.enrol(session)
    assert steps.openings() == [(session, 0) for session in sessions]
    return steps


def forward(steps: AsyncSteps, session: str, step: int = 0, ordinal: int = 0) -> None:
    steps.take_forward(session, step)
    steps.forward_ran(session, step, ordinal)


def backward(steps: AsyncSteps, session: str, step: int = 0, ordinal: int = 0, targets: int = 4) -> None:
    steps.backward_arrived(session, step, ordinal)
    steps.backward_ran(session, step, ordinal, targets)


def contribute(steps: AsyncSteps, session: str, step: int = 0, then: str = "continue") -> None:
    forward(steps, session, step)
    backward(steps, session, step)
    steps.done(session, StepDone(step, 1, 1, then))


def test_a_part_ends_alone_and_the_next_begins_at_once():
    steps = begun("a", "b", contributions=2)
    contribute(steps, "a")
    (part,) = steps.ended()
    assert (part.session, part.step, part.targets, part.withdrawn) == ("a", 0, 4, False)
    assert steps.openings() == [("a", 1)]
    assert steps.close() is None
    contribute(steps, "a", 1)
    assert len(steps.ended()) == 1
    ledger = steps.close()
    assert ledger is not None
    assert (ledger.step, ledger.targets, ledger.ends_parts) == (0, 8, False)
    assert steps.number == 1


def test_what_is_in_the_sum_is_used_and_the_rest_counts_in_the_next():
    steps = begun("a", "b")
    forward(steps, "b")
    forward(steps, "b", ordinal=1)
    backward(steps, "b", ordinal=1, targets=3)
    contribute(steps, "a")
    steps.ended()
    ledger = steps.close()
    assert ledger is not None
    assert ledger.targets_by_client == {"a": 4, "b": 3}
    backward(steps, "b", targets=2)
    steps.done("b", StepDone(0, 2, 2, "continue"))
    (part,) = steps.ended()
    assert (part.targets, part.staleness) == (5, 1)
    ledger = steps.close()
    assert ledger is not None
    assert (ledger.targets, ledger.parts["b"].staleness) == (2, 1)


def test_a_forward_whose_gradient_never_came_holds_nothing_back_once_its_part_has_ended():
    steps = begun("a", max_staleness=0)
    for ordinal in range(2):
        forward(steps, "a", ordinal=ordinal)
    backward(steps, "a")
    assert steps.close() is None
    steps.done("a", StepDone(0, 2, 1, "continue"))
    steps.ended()
    assert steps.close() is not None


def test_a_graph_that_failed_is_gone():
    steps = begun("a", "b", max_staleness=0)
    forward(steps, "a")
    contribute(steps, "b")
    steps.ended()
    assert steps.close() is None
    steps.backward_arrived("a", 0, 0)
    steps.backward_failed("a", 0, 0)
    assert steps.close() is not None


def test_what_has_arrived_of_a_part_is_known_at_its_end():
    steps = begun("a")
    assert steps.is_open
    forward(steps, "a")
    backward(steps, "a")
    assert steps.all_arrived("a") is None  # more may come
    steps.done("a", StepDone(0, 1, 1, "leave"))
    assert steps.all_arrived("a") == 0
    steps.ended()
    assert not steps.is_open


def test_what_there_is_is_used_once_nobody_could_add_to_it():
    steps = begun("a", "b", contributions=3)
    contribute(steps, "a", then="leave")
    steps.ended()
    forward(steps, "b")
    steps.done("b", StepDone(0, 1, 1, "leave"))  # its gradient is still to come
    assert steps.close() is None
    backward(steps, "b")
    steps.ended()
    assert steps.close() is not None


def test_an_empty_sum_makes_no_step():
    steps = begun("a")
    steps.done("a", StepDone(0, 0, 0, "continue"))
    assert len(steps.ended()) == 1
    assert steps.close() is None


def test_a_step_is_held_back_while_it_would_leave_a_graph_too_old():
    steps = begun("a", "b", max_staleness=1)
    forward(steps, "b")
    for number in range(4):
        contribute(steps, "a", number)
        steps.ended()
        assert (steps.close() is not None) == (number == 0)
        steps.openings()
    backward(steps, "b")
    ledger = steps.close()
    assert ledger is not None
    assert (ledger.targets, ledger.parts["b"].staleness, ledger.parts["a"].staleness) == (16, 1, 0)


def test_whoever_holds_a_step_back_is_dropped_after_the_deadline():
    steps = begun("a", "b", max_staleness=0, deadline=5.0)
    forward(steps, "b")
    assert steps.overdue(0.0) == []
    contribute(steps, "a")
    steps.ended()
    assert steps.close() is None
    assert steps.overdue(100.0) == []  # it is only now that somebody waits
    assert steps.wake(101.0) == 4.0
    assert steps.overdue(105.0) == ["b"]
    assert steps.drop("b") == 0
    assert steps.is_ending("b")
    assert steps.close() is not None
    (part,) = steps.ended()
    assert part.withdrawn
    assert [steps.is_stale("b", step) for step in (0, 1, 2)] == [True, True, False]
    steps.done("b", StepDone(0, 1, 0, "continue"))  # crossed the word
    steps.enrol("b")
    assert ("b", 1) in steps.openings()
    assert not steps.is_stale("b", 1)


def test_whoever_is_gone_leaves_what_it_gave_and_nothing_else():
    steps = begun("a", "b", contributions=2)
    forward(steps, "b")
    steps.backward_arrived("b", 0, 0)
    steps.lose("b")
    assert steps.ended() == []
    steps.backward_ran("b", 0, 0, 7)
    assert [part.dropped for part in steps.ended()] == [True]
    contribute(steps, "a", then="leave")
    steps.ended()
    ledger = steps.close()  # nobody is left who could make up the number
    assert ledger is not None
    assert ledger.targets_by_client == {"a": 4, "b": 7}
    steps.lose("a")
    assert not steps._sessions


def test_a_part_that_is_paused_counts_with_what_had_arrived():
    steps = begun("a", "b", contributions=2)
    contribute(steps, "a")
    forward(steps, "b")
    steps.backward_arrived("b", 0, 0)
    assert steps.pause("b") == 0
    steps.ended()
    steps.enrol("b")
    assert ("b", 1) not in steps.openings()  # its gradient is still on the way into the sum
    steps.backward_ran("b", 0, 0, 5)
    steps.ended()
    assert ("b", 1) in steps.openings()


def test_the_end_of_the_run_ends_every_part():
    steps = begun("a", "b", last=1)
    forward(steps, "b")
    contribute(steps, "a")
    steps.ended()
    assert steps.close() is not None
    assert steps.complete
    assert steps.dismiss() == ["a", "b"]
    assert [part.withdrawn for part in steps.ended()] == [True]
    assert steps.openings() == []
    assert steps.is_stale("a", 1)
    assert steps.dismiss() == []


def test_forwards_ahead_wait_and_others_are_refused():
    steps = begun("a", "b")
    contribute(steps, "a")
    steps.take_forward("a", 1)
    assert not steps.is_running("a", 1)
    steps.ended()
    steps.openings()
    assert steps.is_running("a", 1)
    for session, step in (("a", 0), ("a", 3), ("stranger", 0)):
        with pytest.raises(RemoteProtocolError):
            steps.take_forward(session, step)
    with pytest.raises(RemoteProtocolError, match="twice"):
        steps.enrol("a")
    with pytest.raises(RemoteProtocolError, match="not this session's"):
        steps.done("a", StepDone(5, 0, 0, "continue"))


def test_the_mode_of_the_run_says_which():
    for mode in ("sync", "hierarchical"):
        assert isinstance(steps_of(build_config({"model": "m", "mode": mode})), Steps)
    assert isinstance(steps_of(build_config({"model": "m", "mode": "async"})), AsyncSteps)


def test_ordinals_given_twice_do_not_hide_an_old_graph():
    steps = begun("a", "b", max_staleness=1)
    forward(steps, "a")
    for step in range(5):
        forward(steps, "a")
        backward(steps, "a")
        contribute(steps, "b", step)
        steps.ended()
        steps.close()
        steps.openings()
    assert steps.number == 1
    backward(steps, "a")
    assert steps.close() is not None
