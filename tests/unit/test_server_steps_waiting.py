"""Steps: who is late, who is lost, and for whom a step waits."""

import pytest

from server_trunk.steps import Steps
from splitfl.protocol.messages import StepDone
from tests.unit.test_server_steps import backward_ran, contribute, forward_ran, opened, opens


def waiting(*sessions: str, on_loss: str = "drop", deadline: float = 10.0) -> Steps:
    """One open step; the client of session ``x1`` is ``x``."""
    steps = Steps(clients=len(sessions), on_loss=on_loss, deadline=deadline)
    for session in sessions:
        steps.enrol(session, session[0])
    assert opens(steps) == list(sessions)
    return steps


def test_the_deadline_counts_from_when_somebody_waits():
    steps = waiting("a1", "b1")
    assert steps.overdue(0.0) == steps.overdue(100.0) == []
    assert steps.wake(100.0) is None
    contribute(steps, "a1", 3)
    assert steps.overdue(200.0) == []
    assert steps.wake(204.0) == 6.0
    assert steps.overdue(209.9) == []
    assert steps.overdue(210.0) == ["b1"]


def test_a_gradient_that_waits_for_anothers_in_a_batch_is_somebody_who_waits():
    steps = waiting("a1", "b1")
    for session in ("a1", "b1"):
        forward_ran(steps, session)
    assert steps.overdue(0.0) == []
    steps.backward_arrived("a1", 0, 0)
    assert steps.overdue(1.0) == []
    assert steps.overdue(11.0) == ["b1"]  # not a1, whose part is not done either


def test_whoever_was_late_is_out_until_it_enrols_again_and_its_messages_are_stale():
    steps = waiting("a1", "b1")
    forward_ran(steps, "b1")
    contribute(steps, "a1", 3)
    assert steps.drop("b1") == 0
    assert steps.is_ending("b1")
    ledger = steps.close()
    assert ledger is not None
    part = ledger.parts["b1"]
    assert (part.dropped, part.why, part.withdrawn) == (True, "late", True)
    assert opens(steps) == ["a1"]
    assert [steps.is_stale("b1", step) for step in (0, 1, 2)] == [True, True, False]
    steps.done("b1", StepDone(0, 1, 0, "continue"))  # crossed the word: nothing
    steps.enrol("b1", "b")
    contribute(steps, "a1", 1)
    steps.close()
    assert opens(steps) == ["a1", "b1"]
    assert [steps.is_stale("b1", step) for step in (0, 1)] == [True, False]
    assert not steps.is_stale("a1", 0)


def test_whoever_was_done_but_its_data_late_stays_enrolled():
    steps = waiting("a1", "b1")
    contribute(steps, "a1", 3)
    forward_ran(steps, "b1")
    steps.done("b1", StepDone(0, 1, 1, "continue"))
    steps.take_forward("b1", 1)
    steps.drop("b1")
    ledger = steps.close()
    assert ledger is not None
    assert not ledger.parts["b1"].withdrawn
    assert steps.is_stale("b1", 0)
    assert not steps.is_stale("b1", 1)
    assert opens(steps) == ["a1", "b1"]


def test_a_held_part_is_taken_over_and_what_had_counted_is_replayed():
    steps = waiting("a1", "b1", on_loss="wait")
    for ordinal in range(3):
        forward_ran(steps, "b1", ordinal)
    backward_ran(steps, "b1", 7, ordinal=2)
    steps.backward_arrived("b1", 0, 1)  # it will run, after its session is gone
    steps.lose("b1", 50.0)
    contribute(steps, "a1", 3)
    steps.backward_ran("b1", 0, 1, 5)
    assert steps.close() is None
    assert steps.may_evaluate(1)
    assert steps.wake(51.0) == 9.0
    assert steps.overdue(59.0) == []
    steps.enrol("b2", "b")
    assert steps.openings() == [("b2", 0)]
    assert [steps.is_replay("b2", 0, ordinal) for ordinal in range(3)] == [False, True, True]
    for ordinal, targets in enumerate((2, 5, 7)):
        forward_ran(steps, "b2", ordinal)
        backward_ran(steps, "b2", targets, ordinal)
    steps.done("b2", StepDone(0, 3, 3, "continue"))
    ledger = steps.close()
    assert ledger is not None
    part = ledger.parts["b1"]
    assert (part.session, part.targets, part.micro_batches, part.dropped) == ("b2", 14, 3, False)
    assert ledger.targets_by_client == {"a": 3, "b": 14}
    assert opens(steps) == ["a1", "b2"]


def test_a_client_back_before_its_loss_is_noticed_takes_over_too():
    steps = waiting("a1", "b1", on_loss="wait")
    steps.enrol("b2", "b")
    steps.enrol("c1", "c")
    assert steps.openings() == []
    steps.lose("b1", 0.0)
    assert steps.openings() == [("b2", 0)]


def test_nobody_waits_for_ever_for_a_client_that_is_gone():
    steps = waiting("a1", "b1", on_loss="wait")
    steps.lose("b1", 50.0)
    contribute(steps, "a1", 3)
    assert steps.overdue(60.0) == ["b1"]
    steps.drop("b1")
    ledger = steps.close()
    assert ledger is not None
    assert ledger.parts["b1"].why == "lost"
    assert opens(steps) == ["a1"]


def test_whoever_is_lost_between_two_steps_is_awaited_in_the_next():
    steps = waiting("a1", "b1", on_loss="wait")
    contribute(steps, "b1", 1)
    steps.lose("b1", 0.0)
    contribute(steps, "a1", 1)
    assert steps.close() is not None
    assert opens(steps) == ["a1"]
    contribute(steps, "a1", 1)
    assert steps.close() is None
    steps.enrol("b2", "b")
    assert steps.openings() == [("b2", 1)]


def test_a_gradient_that_failed_is_not_counted_as_there():
    steps = waiting("a1", "b1", on_loss="wait")
    forward_ran(steps, "b1")
    steps.backward_arrived("b1", 0, 0)
    steps.backward_failed("b1", 0, 0)
    steps.lose("b1", 0.0)
    steps.enrol("b2", "b")
    steps.openings()
    assert not steps.is_replay("b2", 0, 0)


@pytest.mark.parametrize("vanished", [False, True])
def test_a_part_whose_last_backward_fails_is_waited_for_no_more(vanished):
    steps = opened("a", "b")
    contribute(steps, "a", 10)
    forward_ran(steps, "b")
    steps.backward_arrived("b", 0, 0)
    steps.done("b", StepDone(0, 1, 1, "continue"))
    if vanished:
        steps.lose("b")
        assert steps.close() is None
    steps.backward_failed("b", 0, 0)
    steps.lose("b")
    ledger = steps.close()
    assert ledger is not None
    assert {session: (part.targets, part.dropped) for session, part in ledger.parts.items()} == {"a": (10, False), "b": (0, True)}


def test_a_replay_that_runs_after_its_own_session_was_lost_too_counts_once():
    steps = Steps(clients=1, on_loss="wait")
    steps.enrol("one", "a")
    assert opens(steps) == ["one"]
    forward_ran(steps, "one")
    backward_ran(steps, "one", 4)
    steps.lose("one")
    steps.enrol("two", "a")
    assert opens(steps) == ["two"]
    forward_ran(steps, "two")
    steps.backward_arrived("two", 0, 0)
    steps.lose("two")
    steps.enrol("three", "a")
    assert opens(steps) == ["three"]
    steps.backward_ran("two", 0, 0, 4)
    contribute(steps, "three", 4)
    ledger = steps.close()
    assert ledger is not None
    assert ledger.targets == 4


def test_who_is_lost_while_it_waits_for_a_step_is_away_for_as_long_as_a_step_would_wait():
    steps = Steps(clients=1, on_loss="wait", deadline=5.0)
    steps.enrol("s1", "anna")
    steps.lose("s1", now=10.0)
    assert (steps.away(12.0), steps.wake(12.0)) == ({"anna"}, 3.0)
    assert (steps.away(15.0), steps.wake(15.0)) == (set(), None)
    steps.enrol("s2", "anna")
    steps.openings(16.0)
    assert steps.away(16.0) == set()
    steps.lose("s2", now=17.0)
    assert steps.away(18.0) == {"anna"}
    steps.drop("s2")
    assert steps.away(18.0) == set()
