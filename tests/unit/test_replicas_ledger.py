"""What the run's ledger says of steps over replicas: nobody and nothing is missing from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server_trunk.ledger import LOST, Ledger, Part
from server_trunk.replicas.meetings import Meetings
from server_trunk.replicas.run import ReplicaRun
from server_trunk.replicas.steps import ReplicaSteps
from server_trunk.replicas.words import Close, Grant, Phase, State
from server_trunk.run_ledger import RunLedger
from splitfl.protocol.messages import StepDone


class Keeper:
    """What a replica's run asks of the one that keeps it."""

    def __init__(self, saved: int = -1) -> None:
        self.ledger, self.saved, self.training = RunLedger(), saved, None

    def is_due(self, step: int) -> bool:
        return False


class Told:
    """A group whose other replica says ``theirs``."""

    def __init__(self, theirs: tuple[int | None, Mapping[str, int]]) -> None:
        self._theirs = theirs

    def exchange(self, mine: Any) -> list[Any]:
        return [mine, self._theirs]


def run(every: int, theirs: tuple[int | None, Mapping[str, int]] = (None, {}), saved: int = -1) -> tuple[ReplicaRun, RunLedger]:
    keeper = Keeper(saved)
    made = ReplicaRun(keeper, Told(theirs), Meetings(every, 100))  # type: ignore[arg-type]
    return made, keeper.ledger


def test_a_participant_of_whom_nothing_counted_is_in_the_ledger_of_all_replicas():
    said: list[State] = []
    steps = ReplicaSteps(said.append, meetings=Meetings())
    steps.enrol("a1", "a")
    steps.hear(Grant(0))
    steps.close()
    steps.openings()
    steps.take_forward("a1", 0)
    steps.forward_ran("a1", 0, 0)
    steps.done("a1", StepDone(0, 1, 0, "continue"))
    steps.close()
    steps.openings()
    assert (said[-1].phase, said[-1].counted) == (Phase.WHOLE, {"a": 0})
    steps.hear(Close(0, False, {"a": 0, "b": 3}, 2))
    ledger = steps.close()
    assert ledger is not None
    assert ledger.met == {"a": 0, "b": 3}


def open_for(session: str, *, on_loss: str = "drop") -> tuple[ReplicaSteps, list[State]]:
    """A replica whose only participant has sent a forward of the open step."""
    said: list[State] = []
    steps = ReplicaSteps(said.append, meetings=Meetings(), on_loss=on_loss)
    steps.enrol(session, "a")
    steps.hear(Grant(0))
    turn(steps)
    steps.take_forward(session, 0)
    steps.forward_ran(session, 0, 0)
    return steps, said


def turn(steps: ReplicaSteps) -> Ledger | None:
    ledger = steps.close()
    steps.openings()
    return ledger


def test_the_only_participant_of_a_replica_that_is_lost_is_in_the_ledger_of_all():
    steps, said = open_for("a1")
    steps.lose("a1")
    turn(steps)
    assert (said[-1].phase, said[-1].counted, said[-1].participants) == (Phase.OUT, {"a": 0}, 1)
    steps.hear(Close(0, False, {"a": 0, "b": 3}, 2))
    ledger = turn(steps)
    assert ledger is not None
    (part,) = ledger.parts.values()
    assert (part.client, part.targets, part.dropped, part.why) == ("a", 0, True, LOST)
    assert (ledger.met, ledger.targets, ledger.participants) == ({"a": 0, "b": 3}, 3, 2)
    steps.hear(Close(1, False, {"b": 3}, 1))
    ledger = turn(steps)
    assert ledger is not None
    assert not ledger.parts


def test_a_held_part_that_nobody_waits_for_any_more_is_in_the_ledger():
    steps, said = open_for("a1", on_loss="wait")
    steps.lose("a1")
    turn(steps)
    assert steps.is_open
    steps.drop("a1")
    turn(steps)
    assert (said[-1].phase, said[-1].counted, said[-1].participants) == (Phase.OUT, {"a": 0}, 1)


def test_who_is_lost_and_back_in_the_same_step_is_in_the_ledger_once():
    steps, said = open_for("a1")
    steps.enrol("b1", "b")  # for the next step
    steps.lose("a1")
    turn(steps)
    steps.hear(Grant(0))
    turn(steps)
    assert steps.is_running("b1", 0)
    steps.lose("b1")
    turn(steps)
    steps.enrol("a2", "a")
    steps.hear(Grant(0))
    turn(steps)
    for send in (steps.take_forward, lambda *what: steps.forward_ran(*what, 0), lambda *what: steps.backward_arrived(*what, 0)):
        send("a2", 0)
    steps.backward_ran("a2", 0, 0, 7)
    steps.done("a2", StepDone(0, 1, 1, "continue"))
    turn(steps)
    assert (said[-1].phase, said[-1].counted, said[-1].participants) == (Phase.WHOLE, {"a": 7, "b": 0}, 2)
    steps.hear(Close(0, False, {"a": 7, "b": 0}, 2))
    ledger = turn(steps)
    assert ledger is not None
    assert {part.client: (part.targets, part.why) for part in ledger.parts.values()} == {"a": (7, ""), "b": (0, LOST)}
    assert ledger.participants_elsewhere == ledger.targets_elsewhere == 0


def test_what_counted_before_replicas_met_is_entered_where_they_did():
    made, ledger = run(every=3)
    for step in range(3):
        made.made(Ledger(step, {"a1": Part("a1", "a", targets=5)}, met={"a": 15, "b": 2} if step == 2 else None))
    assert ledger.entries() == [(0, {}), (1, {}), (2, {"a": 15, "b": 2})]


def test_a_run_that_breaks_off_between_two_meetings_keeps_what_has_counted_since_the_last():
    made, ledger = run(4, (5, {"b": 3, "c": 0}))
    made.made(Ledger(3, met={"a": 9}))
    assert made.broke_off(6, {"a": 2, "b": 1}) == 6
    assert ledger.entries()[3:] == [(3, {"a": 9}), (4, {}), (5, {}), (6, {"a": 2, "b": 4, "c": 0})]


def test_a_run_that_breaks_off_where_replicas_have_met_enters_nothing_twice():
    made, ledger = run(4, (3, {}))
    made.made(Ledger(3, met={"a": 9}))
    assert made.broke_off(3, {}) == 3
    assert ledger.entries()[-1] == (3, {"a": 9})
    made, ledger = run(4)
    assert made.broke_off(None, {}) is None
    assert ledger.entries() == []


def test_a_run_that_was_taken_up_again_goes_on_behind_its_checkpoint():
    made, ledger = run(4, (None, {}), saved=7)
    assert made.broke_off(9, {"a": 2}) == 9
    assert ledger.entries() == [(8, {}), (9, {"a": 2})]
