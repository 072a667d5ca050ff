"""Clients that go from one replica to another, as the replicas' steps see them."""

from __future__ import annotations

import pytest

from server_trunk.replicas.meetings import Meetings
from server_trunk.replicas.moving import ARRIVAL
from server_trunk.replicas.steps import ReplicaSteps
from server_trunk.replicas.words import Close, Grant, Move, Phase, Stays
from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import StepDone
from tests.unit.replica_steps_world import STEADY, World


def test_who_moves_takes_part_in_every_step_and_who_has_left_meanwhile_is_not_waited_for():
    world = World(2, clients=3)
    stays, goes, other = (world.add(name, rank, 5) for name, rank in (("stays", 0), ("goes", 0), ("other", 1)))
    world.coordinator._choose = lambda step, movable: world.move("goes", 0, 1, step) if step == 0 else None
    for client in world.clients:
        client.act(STEADY)
    world.settle()
    for client in world.clients:
        client.act(STEADY)
    world.settle()
    assert (goes.rank, goes.stage) == (1, "away")
    assert (stays.step, other.step) == (1, 1)
    for client in (stays, other):
        client.act(STEADY)
        world.settle()
    assert [[ledger.step for ledger in closed] for closed in world.closed] == [[0], [0]]
    goes.act(STEADY)
    world.settle()
    assert (goes.stage, goes.step) == ("in", 1)
    # At the end of that step it is to go back, and pauses before it hears of it.
    world.coordinator._choose = lambda step, movable: world.move("goes", 1, 0, step) if step == 1 else None
    goes.act(STEADY)
    for rank in (0, 1):
        while world.up[rank]:
            world.deliver(rank, up=True)
    goes.steps.pause(goes.session)
    goes.stage = "paused"
    world.settle()
    assert [[ledger.step for ledger in closed] for closed in world.closed] == [[0, 1], [0, 1]]
    for client in (stays, other):
        client.act(STEADY)
    world.settle()
    assert [[ledger.step for ledger in closed] for closed in world.closed] == [[0, 1, 2], [0, 1, 2]]


def test_only_who_would_go_on_elsewhere_with_its_one_session_is_offered():
    said: list = []
    steps = ReplicaSteps(said.append, meetings=Meetings())
    for session, client, moves in (("a", "ada", True), ("b", "ben", False), ("c1", "cleo", True), ("c2", "cleo", True)):
        steps.enrol(session, client, moves=moves)
    for session in ("d1", "d2"):  # one of which pauses, and what it has counted is its own
        steps.enrol(session, "dan", moves=True)
    steps.pause("d2", "dan")
    steps.hear(Grant(0))
    steps.close()
    for session, _ in steps.openings():
        steps.done(session, StepDone(0, 0, 0, "continue"))
    steps.close()
    steps.openings()
    assert said[-1].phase is Phase.WHOLE
    assert said[-1].movable == ("ada",)


def test_who_reaches_the_replica_that_has_let_it_go_is_sent_on():
    said: list = []
    steps = ReplicaSteps(said.append, meetings=Meetings(), on_loss="wait")
    steps.enrol("a1", "ada", moves=True)
    steps.hear(Close(0, True, {}, 0, Move("ada", 0, 1)))
    steps.close()
    steps.lose("a1")  # amid a round that the step has ended
    assert steps.away(0.0) == {"ada"}
    steps.enrol("a2", "ada", moves=True)
    assert said == []
    assert steps.departures() == ["a2"]
    assert said == [Move("ada", 0, 1)]
    steps.enrol("a3", "ada", moves=True)  # its session was opened before rank 0 sent it elsewhere
    assert steps.departures() == ["a3"]
    assert said == [Move("ada", 0, 1)]
    steps.pause("a4", "ada")  # likewise, and it takes no part
    assert said == [Move("ada", 0, 1), Stays("ada", 1)]
    steps.hear(Close(1, True, {}, 0, Move("ada", 1, 0)))
    steps.close()
    steps.enrol("a5", "ada", moves=True)
    assert steps.departures() == []
    assert said == [Move("ada", 0, 1), Stays("ada", 1)]


@pytest.mark.parametrize("moves", [True, False])
def test_who_comes_again_to_the_replica_that_has_let_it_go_or_cannot_be_sent_on_is_asked_for(moves):
    """It has dialled that replica by itself; or was started anew, and does not connect again by itself."""
    said: list = []
    steps = ReplicaSteps(said.append, meetings=Meetings())
    for turn in range(2):
        number = 3 * turn + 1
        steps.enrol("a1", "ada", moves=True)
        steps.hear(Close(2 * turn, True, {}, 0, Move("ada", 0, 1, number)))
        steps.close()
        assert steps.departures() == ["a1"]
        steps.lose("a1")
        assert said == [Move("ada", 0, 1, number)]
        if moves:
            steps.enrol("a2", "ada", moves=True)
            assert steps.departures() == ["a2"]
            steps.lose("a2")
            assert said == [Move("ada", 0, 1, number)]
        steps.enrol("a3", "ada", moves=moves)
        with pytest.raises(RemoteProtocolError, match="twice"):
            steps.enrol("a3", "ada", moves=moves)
        assert steps.departures() == []
        assert said == [Move("ada", 0, 1, number), Move("ada", 1, 0, number)]
        assert steps.openings() == []
        assert steps.away(0.0) == {"ada"}  # a part is held for it
        steps.hear(Move("ada", 1, 0, number + 1))
        assert steps.close() is None
        assert steps.openings() == [("a3", 2 * turn + 1)]
        assert len(said) == 2
        steps.pause("a3", "ada")
        steps.lose("a3")
        assert steps.close() is None
        assert steps.openings() == []
        said.clear()
        steps.hear(Close(2 * turn + 1, True))
        steps.close()


def test_who_takes_part_when_it_is_to_go_and_cannot_be_sent_on_is_asked_for():
    said: list = []
    steps = ReplicaSteps(said.append, meetings=Meetings(), rank=1)
    steps.enrol("a1", "ada", moves=True)
    steps.hear(Close(0, True, {}, 0, Move("ada", 1, 0, 1)))
    steps.close()
    steps.lose("a1")  # amid a round that the step has ended
    steps.enrol("a2", "ada")  # started anew
    assert steps.departures() == []
    assert said == [Move("ada", 1, 0, 1), Move("ada", 0, 1, 1)]
    assert steps.openings() == []
    steps.hear(Move("ada", 0, 1, 2))
    steps.close()
    assert steps.openings() == [("a2", 1)]
    steps.pause("a2", "ada")
    steps.enrol("a2", "ada")
    assert said == [Move("ada", 1, 0, 1), Move("ada", 0, 1, 1)]


@pytest.mark.parametrize("moves", [True, False])
def test_who_takes_part_where_it_belongs_is_not_given_away_and_whoever_asks_sends_it_on(moves):
    here, there = World(2).steps
    said: list = []
    here._say = there._say = said.append
    for steps in (here, there):
        steps.hear(Close(0, True, {}, 0, Move("ada", 0, 1, 1)))
        steps.close()
        steps.departures()
    there.enrol("a1", "ada", moves=True)
    here._sent_on.add("ada")
    here.enrol("a2", "ada", moves=moves)
    asked = said.pop()
    there.hear(asked)
    there.close()
    assert there.openings() == [("a1", 1)]
    refused = said.pop()
    assert (asked, refused) == (Move("ada", 1, 0, 1), Stays("ada", 0))
    here.hear(refused)
    here.close()
    assert here.departures() == ["a2"]
    assert here.away(0.0) == set()


@pytest.mark.parametrize("on_loss", ["drop", "wait"])
def test_who_is_asked_for_and_goes_again_is_held_a_part_only_where_one_was_held_for_it(on_loss):
    for held in (True, False):
        here, there = World(2, on_loss=on_loss).steps
        said: list = []
        here._say = there._say = said.append
        for steps in (here, there):
            steps.hear(Close(0, True, {}, 0, Move("ada", 0, 1, 1)))
            steps.close()
            steps.departures()
            steps.openings()
        if not held:
            there.pause("a1", "ada")  # it has come, and takes no part
        here.enrol("a2", "ada")
        here.openings()
        here.lose("a2")
        said.clear()
        there.hear(Move("ada", 1, 0, 1))
        there.close()
        assert there.away(0.0) == set()
        assert said == [Move("ada", 1, 0, 1)] + [Stays("ada", 0)] * (not held)
        for word in (Move("ada", 1, 0, 2), *said[1:]):
            for steps in (here, there):
                steps.hear(word)
                steps.close()
        assert here.away(0.0) == ({"ada"} if held and on_loss == "wait" else set())
        there.enrol("a3", "ada", moves=True)
        assert there.departures() == ["a3"]


def test_who_is_lost_while_it_is_asked_for_finds_its_part_where_rank_0_sends_it():
    world = World(2, clients=2, on_loss="wait")
    stays, goes = world.add("stays", 0, 5), world.add("goes", 1, 5)
    world.coordinator._choose = lambda step, movable: world.move("goes", 1, 0, step) if step == 0 else None
    for _ in range(2):
        for client in world.clients:
            client.act(STEADY)
        world.settle()
    assert (goes.rank, goes.stage, stays.step) == (0, "away", 1)
    goes.rank = 1  # it is started anew, and dials that replica by itself
    goes.steps.enrol(goes.session, goes.name)
    goes.stage = "enrolled"
    world.turn(1)
    goes.lose()  # before anybody has heard of it
    goes.act(STEADY)
    assert goes.rank == 0
    world.turn(0)
    assert (goes.stage, goes.step) == ("in", 1)
    world.settle()
    for _ in range(3):
        for client in world.clients:
            client.act(STEADY)
        world.settle()
    assert [[ledger.step for ledger in closed] for closed in world.closed] == [[0, 1, 2, 3]] * 2


def test_who_belongs_elsewhere_by_now_is_asked_for_anew_and_at_the_end_of_the_run_hears_of_it():
    said: list = []
    steps = ReplicaSteps(said.append, meetings=Meetings(last=3))
    steps.hear(Close(0, False, {}, 0, Move("ada", 0, 1, 1)))
    steps.close()
    steps.departures()
    steps.enrol("a1", "ada")
    steps.hear(Close(1, False, {}, 0, Move("ada", 1, 2, 2)))
    steps.close()
    assert steps.departures() == []
    assert said[-2:] == [Move("ada", 1, 0, 1), Move("ada", 2, 0, 2)]
    steps.hear(Close(2, False))
    steps.close()
    assert steps.dismiss() == ["a1"]


def test_who_comes_before_the_word_and_is_lost_is_held_one_part():
    steps = ReplicaSteps(lambda word: None, meetings=Meetings(), rank=1, on_loss="wait")
    steps.enrol("a1", "ada", moves=True)
    steps.lose("a1")
    steps.hear(Close(0, True, {}, 0, Move("ada", 0, 1, 1)))
    steps.close()
    steps.openings()
    steps.enrol("a2", "ada", moves=True)
    assert steps.openings() == [("a2", 1)]
    assert steps.away(0.0) == set()


def test_who_is_let_go_finds_its_place_while_rank_0_itself_is_busy():
    world = World(2, clients=2, rounds=1)
    _, goes = world.add("stays", 0, 3), world.add("goes", 1, 3)
    world.coordinator._choose = lambda step, movable: world.move("goes", 1, 0, step) if step == 0 else None
    for client in world.clients:
        client.act(STEADY)
    world.settle()
    for client in world.clients:
        client.act(STEADY)
    for rank in (0, 1):
        while world.up[rank]:
            world.deliver(rank, up=True)
    # From here on the thread of rank 0 looks around no more: a long evaluation runs.
    while world.down[1]:
        world.deliver(1, up=False)
    world.rounds._gathered[0] += 1
    goes.act(STEADY)  # sends its ends, and is let go
    assert goes.session == "goes-1"
    while world.up[1]:
        world.deliver(1, up=True)
    goes.act(STEADY)  # it had dialled before the word was there
    assert (goes.session, goes.rank) == ("goes-2", 0)


def test_a_part_that_has_come_along_and_is_held_for_its_client_stays_held():
    steps = ReplicaSteps(lambda word: None, meetings=Meetings(), rank=1, on_loss="wait")
    steps.hear(Close(0, True, {}, 0, Move("a", 0, 1)))
    steps.close()
    assert steps.departures() == []
    steps.openings()
    steps.enrol("a1", "a")
    assert steps.openings() == [("a1", 1)]
    steps.take_forward("a1", 1)
    steps.lose("a1", 0.0)
    steps.pause("a2", "a")
    assert steps.away(0.0) == {"a"}


@pytest.mark.parametrize("says", [False, True])
def test_who_was_to_come_from_another_replica_is_not_waited_for_for_ever(says):
    world = World(2, clients=2)
    world.add("stays", 0, 3), world.add("goes", 0, 3)
    world.coordinator._choose = lambda step, movable: world.move("goes", 0, 1, step) if step == 0 else None
    for _ in range(2):
        for client in world.clients:
            client.act(STEADY)
        world.settle()
    there = world.steps[1]
    assert there.is_open
    assert there.away(0.0) == {"goes"}
    assert there.wake(10.0) == ARRIVAL - 10.0
    assert there.overdue(ARRIVAL - 1) == []
    assert there.overdue(ARRIVAL) == ["moved goes"]
    if says:
        there.pause("goes-1", "goes")  # it has come, to leave
    else:
        there.drop("moved goes")
    assert there.away(0.0) == set()
    world.turn(1)
    world.clients[0].act(STEADY)
    world.settle()
    assert [ledger.step for ledger in world.closed[0]] == [0, 1]
