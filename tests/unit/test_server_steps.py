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


def resumed(**held: tuple[int, ...]) -> Steps:
    steps = Steps(clients=len(held), first=8)
    for session, steps_held in held.items():
        steps.enrol(session, session, steps_held)
    return steps


@pytest.mark.parametrize(
    ("a", "b", "common"),
    [
        ((7,), (7, 5), None),  # all stand where the run stands
        ((7, 5), (5, 3), 5),
        ((8, 5, 3), (9, 3), 3),
        ((7, 5), (), None),  # who is new goes on from anywhere
        ((5,), (), 5),
        ((7,), (6,), None),  # nothing that all hold: the run stays
        ((4,), (4,), None),  # the server has not kept it
    ],
)
def test_a_resumed_run_begins_where_all_can_begin(a, b, common):
    steps = resumed(a=a, b=b)
    assert steps.common([3, 5, 7]) == common
    if common is not None:
        steps.go_back(common + 1)
        assert steps.common([3, 5, 7]) is None
    assert opens(steps) == ["a", "b"]
    assert steps.number == (8 if common is None else common + 1)


def test_a_run_goes_back_before_its_first_step_only_and_with_everybody_there():
    steps = Steps(clients=2, first=8)
    steps.enrol("a", "a", (5,))
    assert steps.common([5, 7]) is None  # b may hold less
    steps.enrol("b", "b", (7, 5))
    assert steps.common([5, 7]) == 5
    assert opens(steps) == ["a", "b"]
    assert steps.common([5, 7]) is None
    contribute(steps, "a", 1)
    contribute(steps, "b", 1)
    assert steps.close() is not None
    assert steps.common([5, 7]) is None


def test_a_run_taken_up_again_waits_for_all_its_clients_no_longer_than_for_one_in_a_step():
    steps = Steps(clients=2, first=8, deadline=60.0)
    assert (steps.overdue(0.0), steps.wake(0.0)) == ([], None)
    steps.enrol("a")
    steps.overdue(10.0)
    assert (steps.openings(10.0), steps.wake(10.0)) == ([], 60.0)
    steps.lose("a")
    steps.overdue(40.0)
    steps.enrol("b")
    steps.overdue(50.0)
    assert (steps.openings(109.0), steps.wake(109.0)) == ([], 1.0)
    steps.overdue(110.0)
    assert steps.openings(110.0) == [("b", 8)]


@pytest.mark.parametrize("settings", [{"first": 8}, {"deadline": 60.0}])
def test_a_run_that_begins_or_has_no_deadline_waits_for_all_its_clients(settings):
    steps = Steps(clients=2, **settings)
    steps.enrol("a")
    for now in (0.0, 1000.0):
        steps.overdue(now)
        assert (steps.openings(now), steps.wake(now)) == ([], None)
