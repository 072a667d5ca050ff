"""With which gradients a replica's part of a step is likely to end: told from the steps before, never against the evidence."""

from __future__ import annotations

import pytest

from server_trunk.members import Member
from server_trunk.replicas.meetings import Meetings
from server_trunk.replicas.steps import ReplicaSteps
from server_trunk.replicas.words import Close, Grant
from splitfl.protocol.messages import Backward, Forward, StepDone


class Replica:
    """One replica's steps, of which the test is rank 0. Each client has one session, of its name, unless said."""

    def __init__(self, *clients: str, **options) -> None:
        self.steps = ReplicaSteps(lambda word: None, meetings=Meetings(), foresees=True, **options)
        for client in clients:
            self.steps.enrol(client, client)
        self.steps.hear(Grant(0))
        self.turn()

    def turn(self) -> None:
        while self.steps.close() is not None:
            pass
        self.steps.openings()

    def forward(self, session: str, ordinal: int = 0) -> Member:
        step = self.steps.number
        forward = Forward(step, ordinal, ((4, 0),), 8, "float32", "raw", True, True, True, ordinal)
        self.steps.take_forward(session, step)
        self.steps.forward_ran(session, step, ordinal)
        return Member(session, forward, None, session, ordinal)

    def gradient(self, member: Member) -> Member:
        """It arrives."""
        member.backward = Backward(member.forward.step, member.forward.micro, 4, 8, "float32", "raw", 4, 4.0)
        self.steps.backward_arrived(member.session, member.forward.step, member.ordinal)
        return member

    def ran(self, *members: Member) -> None:
        for member in members:
            self.steps.backward_ran(member.session, member.forward.step, member.ordinal, 4)

    def done(self, session: str, backwards: int) -> None:
        self.steps.done(session, StepDone(self.steps.number, backwards, backwards, "continue"))

    def step(self, **backwards: int) -> bool:
        """One step of so many micro-batches of each client; whether it was foreseen which was the last."""
        foreseen = False
        for index, (client, count) in enumerate(backwards.items()):
            for ordinal in range(count):
                assert not foreseen
                member = self.gradient(self.forward(client, ordinal))
                foreseen = self.steps.ends_with([member])
                assert not foreseen or index + 1 == len(backwards)
                self.ran(member)
        for client, count in backwards.items():
            self.done(client, count)
        self.turn()
        self.steps.hear(Close(self.steps.number, True))
        self.turn()
        return foreseen


@pytest.mark.parametrize("each", [1, 3])
def test_a_client_is_taken_to_do_what_it_did_twice(each):
    replica = Replica("a")
    assert [replica.step(a=each) for _ in range(4)] == [False, False, True, True]


def test_a_client_that_changes_is_not_foreseen_until_it_has_settled():
    replica = Replica("a")
    for count in (2, 2):
        replica.step(a=count)
    first = replica.gradient(replica.forward("a"))
    assert not replica.steps.ends_with([first])
    replica.ran(first)
    replica.done("a", 1)  # fewer than ever: that is known from its word
    replica.turn()
    replica.steps.hear(Close(replica.steps.number, True))
    replica.turn()
    assert [replica.step(a=2) for _ in range(3)] == [False, False, True]


def test_all_participants_have_to_be_there():
    replica = Replica("a", "b")
    assert [replica.step(a=1, b=2) for _ in range(3)] == [False, False, True]


def test_gradients_that_run_elsewhere_or_are_yet_to_come_are_waited_for():
    replica = Replica("a", "b")
    for _ in range(2):
        replica.step(a=1, b=1)
    mine, theirs = replica.gradient(replica.forward("a")), replica.forward("b")
    assert not replica.steps.ends_with([mine])
    assert not replica.steps.ends_with([mine, theirs])
    replica.gradient(theirs)
    assert not replica.steps.ends_with([mine])  # the other is in another batch
    assert replica.steps.ends_with([mine, theirs])
    replica.forward("b", 1)  # more than usual
    assert not replica.steps.ends_with([mine, theirs])


def test_whoever_has_said_that_its_part_is_done_need_not_be_known():
    replica = Replica("a")
    member = replica.gradient(replica.forward("a"))
    replica.done("a", 1)
    assert replica.steps.ends_with([member])


def test_who_is_gone_is_not_waited_for_and_who_is_held_is():
    for on_loss, foreseen in (("drop", True), ("wait", False)):
        replica = Replica("a", "b", on_loss=on_loss)
        for _ in range(2):
            replica.step(a=1, b=1)
        member = replica.gradient(replica.forward("a"))
        replica.forward("b")
        replica.steps.lose("b", 0.0)
        assert replica.steps.ends_with([member]) is foreseen


def test_a_part_that_is_taken_over_ends_when_all_of_it_is_there_again():
    replica = Replica("a", on_loss="wait")
    for _ in range(2):
        replica.step(a=2)
    replica.ran(replica.gradient(replica.forward("a")))
    replica.steps.lose("a", 0.0)
    replica.steps.enrol("again", "a")
    assert replica.steps.openings(0.0) == [("again", replica.steps.number)]
    replayed = replica.gradient(replica.forward("again"))
    assert not replica.steps.ends_with([replayed])
    replica.ran(replayed)
    assert replica.steps.ends_with([replica.gradient(replica.forward("again", 1))])


def test_nothing_is_foreseen_where_nothing_is_gained():
    replica = Replica("a")
    for _ in range(2):
        replica.step(a=1)
    replica.steps._foresees = False
    assert not replica.steps.ends_with([replica.gradient(replica.forward("a"))])
