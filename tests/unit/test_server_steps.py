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
