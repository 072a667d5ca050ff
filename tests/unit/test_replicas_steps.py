"""Steps over replicas: rank 0's decisions and each replica's own steps, with every word delayed as it likes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server_trunk.replicas.coordinator import Coordinator
from server_trunk.replicas.steps import ReplicaSteps
from server_trunk.replicas.words import GoBack
from tests.unit.replica_steps_world import STEADY, TARGETS, World


def test_the_first_step_waits_for_all_clients_wherever_they_are():
    world = World(2, clients=3)
    first, second, third = world.add("a", 0), world.add("b", 1), world.add("c", 1)
    first.act(STEADY)
    second.act(STEADY)
    world.settle()
    assert [client.stage for client in world.clients] == ["enrolled", "enrolled", "away"]
    third.act(STEADY)
    world.settle()
    assert [client.stage for client in world.clients] == ["in", "in", "in"]


def test_a_replica_without_clients_closes_each_step_with_nothing():
    world = World(3, clients=1)
    client = world.add("a", 1, parts=2)
    for _ in range(3):
        client.act(STEADY)
        world.settle()
    for rank in range(3):
        assert [ledger.step for ledger in world.closed[rank]] == [0, 1]
        assert [ledger.targets for ledger in world.closed[rank]] == [TARGETS, TARGETS]
        assert [ledger.participants for ledger in world.closed[rank]] == [1, 1]
    assert [len(ledger.parts) for ledger in world.closed[0]] == [0, 0]


def test_who_comes_while_a_part_is_whole_waits_for_the_next_step():
    world = World(3, clients=2)
    quick, slow = world.add("quick", 0, 2), world.add("slow", 1, 2)
    quick.act(STEADY)
    slow.act(STEADY)
    world.settle()
    quick.act(STEADY)
    world.settle()
    late = world.add("late", 2)
    late.act(STEADY)
    world.settle()
    assert late.stage == "enrolled"
    slow.act(STEADY)
    world.settle()
    assert (late.stage, late.step) == ("in", 1)


def test_a_participant_is_late_also_where_only_another_replica_waits():
    world = World(2, clients=2)
    world.steps[1] = ReplicaSteps(world.up[1].append, meetings=world.meetings, deadline=5.0)
    done, late = world.add("done", 0), world.add("late", 1)
    done.act(STEADY)
    late.act(STEADY)
    world.settle()
    assert world.steps[1].overdue(0.0) == []
    done.act(STEADY)
    world.settle()
    assert world.steps[1].overdue(10.0) == []
    assert world.steps[1].wake(10.0) == 5.0
    assert world.steps[1].overdue(15.0) == ["late"]
    world.steps[1].drop("late")
    world.turn(1)
    world.settle()
    assert [ledger.step for ledger in world.closed[0]] == [0]
    assert world.closed[1][0].parts["late"].dropped


def test_a_step_that_all_left_before_anything_counted_opens_anew_under_its_number():
    world = World(2, clients=2)
    world.add("a", 0), world.add("b", 1)
    for client in world.clients:
        client.act(STEADY)
    world.settle()
    for client in world.clients:
        client.steps.pause(client.name)
        client.stage = "away"
        world.turn(client.rank)
    world.settle()
    assert world.closed == [[], []]
    world.clients[0].act(STEADY)
    world.settle()
    assert world.clients[0].step == 0
    world.clients[0].act(STEADY)
    world.settle()
    assert [[ledger.step for ledger in closed] for closed in world.closed] == [[0], [0]]


def test_between_meetings_a_replica_makes_steps_of_its_own_and_who_comes_late_joins_at_the_furthest():
    world = World(3, clients=1, every=4)
    first = world.add("first", 0, 4)
    for _ in range(4):
        first.act(STEADY)
        world.settle()
    assert [ledger.step for ledger in world.closed[0]] == [0, 1, 2]
    late = world.add("late", 1, 1)
    late.act(STEADY)
    world.settle()
    assert late.step == 3
    first.act(STEADY)
    world.settle()
    assert [ledger.step for ledger in world.closed[0]] == [0, 1, 2]
    late.act(STEADY)
    world.settle()
    assert [[ledger.step for ledger in closed] for closed in world.closed] == [[0, 1, 2, 3], [3], [3]]


def test_who_leaves_amid_a_round_holds_nobody_up():
    world = World(2, clients=2, every=4)
    leaves, stays = world.add("leaves", 0, 1), world.add("stays", 1, 4)
    for client in (leaves, stays):
        client.act(STEADY)
    world.settle()
    leaves.act(STEADY)
    for _ in range(4):
        stays.act(STEADY)
        world.settle()
    assert [[ledger.step for ledger in closed] for closed in world.closed] == [[0, 3], [0, 1, 2, 3]]


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(1, 4),
    seed=st.integers(0, 2**32),
    every=st.sampled_from([1, 1, 3]),
    people=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=6),
    last=st.sampled_from([0, 0, 4]),
    moves=st.booleans(),
    rounds=st.sampled_from([0, 1, 3]),
    on_loss=st.sampled_from(["drop", "wait"]),
)
def test_whatever_crosses_everybody_agrees_and_nobody_waits_for_ever(size, seed, every, people, last, moves, rounds, on_loss):
    draw = random.Random(seed)
    mover = random.Random(seed) if moves else None
    # Replicas meet where a round ends.
    world = World(
        size, clients=draw.randint(1, len(people)), every=every, last=last, mover=mover, rounds=every * rounds, on_loss=on_loss
    )
    for number, (rank, parts) in enumerate(people):
        world.add(f"client{number}", rank % size, parts)
    quiet = 0
    while quiet < 600:
        busy = [client for client in world.clients if client.stage != "away" or client.left or world.rounds.awaits(client)]
        choices = [(world.deliver, each) for each in world.underway()] + [(client.act, draw) for client in busy]
        choices += [(world.turn, rank) for rank in range(size) if world.rounds.is_open(rank)]
        if not choices:
            break
        before = len(world.trained)
        act, argument = draw.choice(choices)
        if act == world.deliver:
            world.deliver(argument[0], up=argument[1])
        else:
            act(argument)
        quiet = quiet + 1 if len(world.trained) == before else 0
    world.settle()
    complete = last and world.coordinator.step >= last
    for closed in world.closed:
        met = [ledger.step for ledger in closed if world.meetings.meets_at(ledger.step)]
        assert met == [ledger.step for ledger in world.closed[0] if world.meetings.meets_at(ledger.step)]
        assert [ledger.step for ledger in closed] == sorted({ledger.step for ledger in closed})
    if every == 1:
        for ledgers in zip(*world.closed, strict=True):
            assert len({(ledger.targets, ledger.participants) for ledger in ledgers}) == 1
            assert ledgers[0].targets == sum(ledger.targets_here for ledger in ledgers)
            assert any(part.targets for ledger in ledgers for part in ledger.parts.values()), "nobody took part in a step"
        counted = sum(ledgers[0].targets for ledgers in zip(*world.closed, strict=True))
        assert counted == TARGETS * len(world.trained)
    assert complete or all(not client.left for client in world.clients), "somebody waits for ever"


def test_a_run_that_is_taken_up_again_goes_back_to_what_all_clients_hold():
    world = World(2, clients=2)
    world.coordinator = Coordinator(2, clients=2, meetings=world.meetings, first=8, kept=lambda: (3, 5, 7))
    world.steps = [ReplicaSteps(words.append, meetings=world.meetings, first=8) for words in world.up]
    for rank, held in enumerate([(3, 5, 7), (3, 5)]):
        world.add(f"client{rank}", rank).stage = "enrolled"
        world.steps[rank].enrol(f"client{rank}", f"client{rank}", held)
        world.turn(rank)
    for rank in (0, 1):
        world.deliver(rank, up=True)
    assert list(world.down[0]) == list(world.down[1]) == [GoBack(5)]
    for rank in (0, 1):
        world.steps[rank].hear(world.down[rank].popleft())
        assert world.steps[rank].close() is None
        assert world.steps[rank].common(()) == 5
        world.steps[rank].go_back(6)  # as the keeper does
        world.turn(rank)
    world.settle()
    assert [(client.stage, client.step) for client in world.clients] == [("in", 6), ("in", 6)]


def test_a_first_step_for_which_no_further_clients_are_awaited_opens_for_those_who_are_there():
    world = World(2, clients=3)
    for name, rank in (("a", 0), ("b", 1)):
        world.add(name, rank).act(STEADY)
    world.settle()
    for rank, word in world.coordinator.begin():
        world.down[rank].append(word)
    world.settle()
    assert [client.stage for client in world.clients] == ["in", "in"]
    assert world.coordinator.begin() == []


@pytest.mark.parametrize("back", [True, False])
def test_all_replicas_hear_whether_the_server_means_to_be_back(back):
    world = World(2, clients=2)
    heard: list[bool] = []
    world.steps[1] = ReplicaSteps(world.up[1].append, meetings=world.meetings, on_stop=heard.append)
    first, second = world.add("a", 0), world.add("b", 1)
    for client in (first, second):
        client.act(STEADY)
    world.settle()
    for told, word in world.coordinator.drain() if back else world.coordinator.stop():
        world.down[told].append(word)
    world.settle()
    assert heard == ([] if back else [False])
    for client in (first, second):
        client.act(STEADY)
    world.settle()
    assert heard == [back]
    assert len(world.closed[1]) == back
