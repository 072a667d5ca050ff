"""A coordinator, its replicas' steps and their clients in one process, with every word delayed as it likes."""

from __future__ import annotations

import random
from collections import deque

from server_trunk.replicas.coordinator import Coordinator
from server_trunk.replicas.meetings import Meetings
from server_trunk.replicas.steps import ReplicaSteps
from server_trunk.replicas.words import Move, State, Stays
from splitfl.protocol.messages import StepDone

TARGETS = 10


class Client:
    """A session that trains ``parts`` steps at one replica, each of one micro-batch, and may pause in between."""

    def __init__(self, world: World, name: str, rank: int, parts: int) -> None:
        self.world, self.name, self.rank, self.left = world, name, rank, parts
        self.step: int | None = None  # the one it is in
        self.stage = "away"
        self.session, self.moves = name, 0

    @property
    def steps(self) -> ReplicaSteps:
        return self.world.steps[self.rank]

    def move(self, rank: int) -> None:
        """Its session has ended; it will come to another replica."""
        self.steps.lose(self.session)
        self.moves += 1
        self.session, self.rank, self.stage = f"{self.name}-{self.moves}", rank, "away"

    def act(self, draw: random.Random) -> None:
        """Do one of the things a client can do now; each through the trunk's thread of its replica."""
        steps = self.steps
        if self.stage == "away" and self.left:
            steps.enrol(self.session, self.name, moves=True)
            self.stage = "enrolled"
        elif self.stage == "enrolled" and draw.random() < 0.1:
            steps.pause(self.session)
            self.stage = "away"
        elif self.stage == "in":
            assert self.step is not None
            if draw.random() < 0.1:
                steps.pause(self.session)
                self.stage = "away"
                return
            steps.take_forward(self.session, self.step)
            steps.forward_ran(self.session, self.step, 0)
            if draw.random() < 0.1:
                self.move(self.rank)  # it is lost, and comes again
                return
            steps.backward_arrived(self.session, self.step, 0)
            steps.backward_ran(self.session, self.step, 0, TARGETS)
            self.left -= 1
            then = "leave" if not self.left else "pause" if draw.random() < 0.2 else "continue"
            steps.done(self.session, StepDone(self.step, 1, 1, then))
            self.world.trained.append((self.name, self.step))
            self.stage = "enrolled" if then == "continue" else "away"
        self.world.turn(self.rank)


class World:
    """A coordinator and replicas; words wait in one queue for each direction of each replica until they are delivered."""

    def __init__(self, size: int, *, clients: int = 1, every: int = 1, last: int = 0, mover: random.Random | None = None) -> None:
        self.meetings = Meetings(every, last)
        self.places: dict[str, int] = {}
        self.mover = mover
        self.coordinator = Coordinator(size, clients=clients, meetings=self.meetings, choose=self._choose)
        self.up: list[deque[State | Stays]] = [deque() for _ in range(size)]
        self.down: list[deque] = [deque() for _ in range(size)]
        self.whole: list[int] = [0] * size
        self.steps = [
            ReplicaSteps(
                self.up[rank].append, meetings=self.meetings, rank=rank, on_whole=lambda targets, rank=rank: self._is_whole(rank)
            )
            for rank in range(size)
        ]
        self.closed: list[list] = [[] for _ in range(size)]  # ledgers
        self.clients: list[Client] = []
        self.trained: list[tuple[str, int]] = []

    def _choose(self, step, movable) -> Move | None:
        """Anybody, anywhere, now and then."""
        if self.mover is None or self.mover.random() < 0.5:
            return None
        rank, other = (self.mover.randrange(len(movable)) for _ in range(2))
        if rank == other or not movable[rank]:
            return None
        move = Move(self.mover.choice(movable[rank]), rank, other)
        self.places[move.client] = other
        return move

    def _is_whole(self, rank: int) -> None:
        self.whole[rank] += 1

    def turn(self, rank: int) -> None:
        """One turn of a replica's trunk thread."""
        ledger = self.steps[rank].close()
        if ledger is not None:
            self.closed[rank].append(ledger)
        for session in self.steps[rank].departures():
            client = next(client for client in self.clients if client.session == session)
            client.move(self.places[client.name])
        for session, step in self.steps[rank].openings():
            client = next(client for client in self.clients if client.session == session)
            assert client.stage == "enrolled"
            client.step, client.stage = step, "in"

    def deliver(self, rank: int, *, up: bool) -> None:
        """The oldest word of one direction arrives."""
        if up:
            word = self.up[rank].popleft()
            told = [(word.rank, word)] if isinstance(word, Stays) else self.coordinator.hear(rank, word)
            for other, answer in told:
                self.down[other].append(answer)
        else:
            self.steps[rank].hear(self.down[rank].popleft())
            self.turn(rank)

    def underway(self) -> list[tuple[int, bool]]:
        return [(rank, True) for rank, words in enumerate(self.up) if words] + [
            (rank, False) for rank, words in enumerate(self.down) if words
        ]

    def settle(self) -> None:
        """All words arrive."""
        while underway := self.underway():
            rank, up = underway[0]
            self.deliver(rank, up=up)

    def add(self, name: str, rank: int, parts: int = 1) -> Client:
        self.clients.append(Client(self, name, rank, parts))
        return self.clients[-1]


class Steady(random.Random):
    """Never lets a client pause."""

    def random(self) -> float:
        return 1.0


STEADY = Steady()
