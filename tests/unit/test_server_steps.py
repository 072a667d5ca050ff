"""Steps: who takes part, what counts, when a step closes."""

import pytest

from server_trunk.steps import Steps
from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import StepDone


def opened(*sessions: str, last: int = 0) -> Steps:
    steps = Steps(clients=len(sessions), last=last)
    for session in sessions:
        steps.enrol(session)
    assert steps.open_next() == list(sessions)
    return steps


def contribute(steps: Steps, session: str, targets: int, then: str = "continue") -> None:
    step = steps.number
    steps.forward_ran(session)
    steps.backward_ran(session, step, targets)
    steps.done(session, StepDone(step, 1, 1, then))


def test_the_first_step_waits_for_the_configured_number():
    steps = Steps(clients=3)
    for session in "ab":
        steps.enrol(session)
        assert steps.open_next() == []
    steps.enrol("c")
    assert steps.open_next() == ["a", "b", "c"]


def test_a_step_closes_when_all_parts_are_done_and_sums_targets():
    steps = opened("a", "b")
    contribute(steps, "a", 10)
    assert steps.close() is None
    contribute(steps, "b", 5)
    ledger = steps.close()
    assert ledger is not None
    assert (ledger.step, ledger.targets) == (0, 15)
    assert steps.open_next() == ["a", "b"]
    assert steps.number == 1


def test_a_declared_backward_holds_the_step_until_it_has_run():
    steps = opened("a")
    steps.forward_ran("a")
    steps.done("a", StepDone(0, 1, 1, "continue"))
    assert steps.close() is None
    steps.backward_ran("a", 0, 4)
    assert steps.close() is not None


def test_a_lost_participant_is_dropped_but_what_ran_counts():
    steps = opened("a", "b")
    steps.forward_ran("b")
    steps.backward_ran("b", 0, 7)
    steps.lose("b")
    contribute(steps, "a", 3)
    ledger = steps.close()
    assert ledger is not None
    assert ledger.targets == 10
    assert ledger.parts["b"].dropped
    assert steps.open_next() == ["a"]


def test_a_step_that_all_left_before_anything_counted_opens_anew_under_its_number():
    steps = opened("a")
    steps.lose("a")
    assert steps.close() is None
    assert steps.number == 0
    steps.enrol("b")
    assert steps.open_next() == ["b"]
    contribute(steps, "b", 1)
    assert steps.close() is not None


def test_pause_before_contributing_frees_the_open_step():
    steps = opened("a", "b")
    steps.pause("b")
    contribute(steps, "a", 3)
    ledger = steps.close()
    assert ledger is not None
    assert list(ledger.parts) == ["a"]
    assert steps.open_next() == ["a"]


@pytest.mark.parametrize("then", ["pause", "leave"])
def test_then_withdraws_from_the_next_step(then):
    steps = opened("a", "b")
    contribute(steps, "a", 1, then)
    contribute(steps, "b", 1)
    steps.close()
    assert steps.open_next() == ["b"]


def test_a_run_of_n_steps_ends():
    steps = opened("a", last=1)
    contribute(steps, "a", 1)
    steps.close()
    assert steps.complete
    assert steps.open_next() == []


def test_a_forward_of_the_next_step_waits_and_others_are_refused():
    steps = opened("a", "b")
    assert steps.may_train("a", 0)
    contribute(steps, "a", 1)
    assert not steps.may_train("a", 1)
    assert not steps.may_train("b", 1)  # its end of step 0 may still be under way
    for session, step in (("a", 0), ("a", 2), ("b", 2), ("stranger", 0)):
        with pytest.raises(RemoteProtocolError):
            steps.may_train(session, step)


@pytest.mark.parametrize("message", [StepDone(1, 0, 0, "continue"), StepDone(0, 0, 0, "continue"), StepDone(0, 1, 2, "continue")])
def test_a_lying_end_of_step_is_refused(message):
    steps = opened("a")
    steps.forward_ran("a")
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
