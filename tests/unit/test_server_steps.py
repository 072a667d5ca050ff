"""Steps: who takes part, what counts, when a step closes."""

import pytest

from server_trunk.steps import Steps
from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import StepDone


def opened(*sessions: str, last: int = 0) -> Steps:
    steps = Steps(clients=len(sessions), last=last)
    for session in sessions:
        steps.enrol(session)
    assert opens(steps) == list(sessions)
    return steps


def opens(steps: Steps) -> list[str]:
    return [session for session, _ in steps.openings()]


def forward_ran(steps: Steps, session: str, ordinal: int = 0) -> None:
    steps.take_forward(session, steps.number)
    steps.forward_ran(session, steps.number, ordinal)


def backward_ran(steps: Steps, session: str, targets: int, ordinal: int = 0) -> None:
    steps.backward_arrived(session, steps.number, ordinal)
    steps.backward_ran(session, steps.number, ordinal, targets)


def contribute(steps: Steps, session: str, targets: int, then: str = "continue") -> None:
    step = steps.number
    forward_ran(steps, session)
    backward_ran(steps, session, targets)
    steps.done(session, StepDone(step, 1, 1, then))


def test_the_first_step_waits_for_the_configured_number():
    steps = Steps(clients=3)
    for session in "ab":
        steps.enrol(session)
        assert opens(steps) == []
    steps.enrol("c")
    assert opens(steps) == ["a", "b", "c"]


def test_a_step_closes_when_all_parts_are_done_and_sums_targets():
    steps = opened("a", "b")
    contribute(steps, "a", 10)
    assert steps.close() is None
    contribute(steps, "b", 5)
    ledger = steps.close()
    assert ledger is not None
    assert (ledger.step, ledger.targets) == (0, 15)
    assert opens(steps) == ["a", "b"]
    assert steps.number == 1


def test_a_declared_backward_holds_the_step_until_it_has_run():
    steps = opened("a")
    forward_ran(steps, "a")
    steps.done("a", StepDone(0, 1, 1, "continue"))
    assert steps.close() is None
    backward_ran(steps, "a", 4)
    assert steps.close() is not None


def test_a_lost_participant_is_dropped_but_what_ran_counts():
    steps = opened("a", "b")
    forward_ran(steps, "b")
    backward_ran(steps, "b", 7)
    steps.lose("b")
    contribute(steps, "a", 3)
    ledger = steps.close()
    assert ledger is not None
    assert ledger.targets == 10
    assert ledger.parts["b"].dropped
    assert opens(steps) == ["a"]


def test_a_step_that_all_left_before_anything_counted_opens_anew_under_its_number():
    steps = opened("a")
    steps.lose("a")
    assert steps.close() is None
    assert steps.number == 0
    steps.enrol("b")
    assert opens(steps) == ["b"]
    contribute(steps, "b", 1)
    assert steps.close() is not None


def test_pause_before_contributing_frees_the_open_step():
    steps = opened("a", "b")
    steps.pause("b")
    contribute(steps, "a", 3)
    ledger = steps.close()
    assert ledger is not None
    assert list(ledger.parts) == ["a"]
    assert opens(steps) == ["a"]


@pytest.mark.parametrize("then", ["pause", "leave"])
def test_then_withdraws_from_the_next_step(then):
    steps = opened("a", "b")
    contribute(steps, "a", 1, then)
    contribute(steps, "b", 1)
    steps.close()
    assert opens(steps) == ["b"]


def test_a_run_of_n_steps_ends():
    steps = opened("a", last=1)
    contribute(steps, "a", 1)
    steps.close()
    assert steps.complete
    assert opens(steps) == []


def test_a_forward_of_the_next_step_waits_and_others_are_refused():
    steps = opened("a", "b")
    steps.take_forward("a", 0)
    assert steps.is_running("a", 0)
    steps.forward_ran("a", 0, 0)
    backward_ran(steps, "a", 1)
    steps.done("a", StepDone(0, 1, 1, "continue"))
    for session in "ab":  # the end of b's step 0 may still be under way
        steps.take_forward(session, 1)
        assert not steps.is_running(session, 1)
    for session, step in (("a", 0), ("a", 2), ("b", 2), ("stranger", 0)):
        with pytest.raises(RemoteProtocolError):
            steps.take_forward(session, step)


@pytest.mark.parametrize("message", [StepDone(1, 0, 0, "continue"), StepDone(0, 0, 0, "continue"), StepDone(0, 1, 2, "continue")])
def test_a_lying_end_of_step_is_refused(message):
    steps = opened("a")
    forward_ran(steps, "a")
    with pytest.raises(RemoteProtocolError):
        steps.done("a", message)


def test_a_step_ends_once():
    steps = opened("a", "b")
    contribute(steps, "a", 1)
    with pytest.raises(RemoteProtocolError):
        steps.done("a", StepDone(0, 1, 1, "continue"))


def test_nobody_enrols_twice():
    steps = opened("a")
    with pytest.raises(RemoteProtocolError):
        steps.enrol("a")
