"""A coordinator, its replicas' steps and their clients in one process, with every word delayed as it likes."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

from server_trunk.replicas.assignment import Assignment
from server_trunk.replicas.coordinator import Coordinator
from server_trunk.replicas.meetings import Meetings
from server_trunk.replicas.steps import ReplicaSteps
from server_trunk.replicas.words import Move, State, Stays
from splitfl.protocol.messages import StepDone

TARGETS = 10


class Client:
    """A client that trains ``parts`` steps, each of one micro-batch, in one session after another; it may pause in between."""

    def __init__(self, world: World, name: str, rank: int, parts: int) -> None:
        self.world, self.name, self.rank, self.left = world, name, rank, parts
        self.step: int | None = None  # the one it is in
        self.stage = "away"
        self.session, self.sessions = name, 0
        self.was_lost = False  # and has yet to come again

    @property
    def steps(self) -> ReplicaSteps:
        return self.world.steps[self.rank]

    def lose(self) -> None:
        """Its session has ended; it dials at once, and comes when it likes to where it is then sent."""
        self.steps.lose(self.session)
        self.world.rounds.lose(self)
        self.sessions, self.was_lost = self.sessions + 1, True
        self.session, self.rank, self.stage = f"{self.name}-{self.sessions}", self.world.places[self.name], "away"

    def _comes_to(self, draw: random.Random) -> int:
        """It dials later, or by itself one of the replicas that it was moved from, unless something is held for it elsewhere."""
        left = [rank for rank, steps in enumerate(self.world.steps) if steps._elsewhere(self.name) is not None]
        held = any(self.name in steps.away(0.0) for steps in self.world.steps) or self.world.rounds.await_client(self.name)
        return self.world.places[self.name] if held or not left or draw.random() < 0.5 else draw.choice(left)

    def act(self, draw: random.Random) -> None:
        """Do one of the things a client can do now; each through the trunk's thread of its replica."""
        steps = self.steps
        if self.world.rounds.awaits(self):
            if draw.random() < 0.2:
                self.lose()
            else:
                self.world.rounds.upload(self)
        elif self.stage == "away" and self.left:
            if self.was_lost and draw.random() < 0.3:
                self.rank = self._comes_to(draw)
            self.was_lost = False
            self.steps.enrol(self.session, self.name, moves=draw.random() > 0.1)
            self.world.rounds.returns(self)
            self.stage = "enrolled"
        elif self.stage == "enrolled" and draw.random() < 0.1:
            if draw.random() < 0.5:
                self.lose()
                return
            steps.pause(self.session, self.name)
            self.stage = "away"
        elif self.stage == "in":
            assert self.step is not None
            if draw.random() < 0.1:
                steps.pause(self.session, self.name)
                self.stage = "away"
                return
            steps.take_forward(self.session, self.step)
            steps.forward_ran(self.session, self.step, 0)
            if draw.random() < 0.1:
                self.lose()
                return
            steps.backward_arrived(self.session, self.step, 0)
            steps.backward_ran(self.session, self.step, 0, TARGETS)
            self.left -= 1
            then = "leave" if not self.left else "pause" if draw.random() < 0.2 else "continue"
            steps.done(self.session, StepDone(self.step, 1, 1, then))
            self.world.trained.append((self.name, self.step))
            self.stage = "enrolled" if then == "continue" else "away"
        self.world.turn(self.rank)


class Rounds:
    """Rounds of the ends, each over everywhere once all replicas have the ends of all their members. ``steps``: of a round; 0:
    there are none. ``waits``: for members that are lost and were to go on.
    """

    def __init__(self, size: int, steps: int, *, waits: bool) -> None:
        self.steps, self._waits = steps, waits
        self._awaited: list[dict[str, str] | None] = [None] * size  # by replica: clients by session; None: no round is open
        self._gathered = [0] * size  # rounds

    def end_with(self, step: int) -> bool:
        return bool(self.steps) and (step + 1) % self.steps == 0

    def open(self, rank: int, members: dict[str, str]) -> None:
        self._awaited[rank] = members
        self._gathered[rank] += not members

    def is_open(self, rank: int) -> bool:
        return self._awaited[rank] is not None

    def is_over(self, rank: int) -> bool:
        if self._awaited[rank] == {} and min(self._gathered) == self._gathered[rank]:
            self._awaited[rank] = None
        return self._awaited[rank] is None

    def awaits(self, client: Client) -> bool:
        return client.session in (self._awaited[client.rank] or {})

    def await_client(self, name: str) -> bool:
        return any(name in (awaited or {}).values() for awaited in self._awaited)

    def upload(self, client: Client) -> None:
        self._forget(client.rank, client.session)

    def lose(self, client: Client) -> None:
        if self.awaits(client) and not (self._waits and client.stage == "enrolled"):
            self._forget(client.rank, client.session)

    def returns(self, client: Client) -> None:
        """Where it is waited for, its new session takes the place of the lost one."""
        awaited = self._awaited[client.rank] or {}
        lost = next((each for each, name in awaited.items() if name == client.name), None)
        if lost is not None:
            awaited[client.session] = awaited.pop(lost)

    def _forget(self, rank: int, session: str) -> None:
        awaited = self._awaited[rank]
        assert awaited is not None
        del awaited[session]
        self._gathered[rank] += not awaited


class World:
    """A coordinator and replicas; words wait in one queue for each direction of each replica until they are delivered."""

    def __init__(
        self,
        size: int,
        *,
        clients: int = 1,
        every: int = 1,
        last: int = 0,
        mover: random.Random | None = None,
        rounds: int = 0,
        on_loss: str = "drop",
    ) -> None:
        self.meetings = Meetings(every, last)
        self.rounds = Rounds(size, rounds, waits=on_loss == "wait")
        self.assignment = Assignment(size)
        self.places = self.assignment.places  # where rank 0 sends who dials
        self.mover = mover
        self.coordinator = Coordinator(size, clients=clients, meetings=self.meetings, choose=self._choose)
        self.up: list[deque[State | Stays | Move]] = [deque() for _ in range(size)]
        self.down: list[deque] = [deque() for _ in range(size)]
        self.whole: list[int] = [0] * size
        self.steps = [
            ReplicaSteps(
                self.up[rank].append,
                meetings=self.meetings,
                rank=rank,
                on_loss=on_loss,
                on_whole=lambda targets, rank=rank: self._is_whole(rank),
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
        return self.move(self.mover.choice(movable[rank]), rank, other, step)

    def move(self, client: str, origin: int, target: int, step: int) -> Move:
        """It is to move after ``step``."""
        return self.assignment.decide(client, origin, target, at_once=not self.rounds.end_with(step))

    def _is_whole(self, rank: int) -> None:
        self.whole[rank] += 1

    def turn(self, rank: int) -> None:
        """One turn of a replica's trunk thread."""
        if not self.rounds.is_over(rank):
            return
        self._depart(rank)
        ledger = self.steps[rank].close()
        if ledger is not None:
            self.closed[rank].append(ledger)
            if self.rounds.end_with(ledger.step):
                present = {client.session for client in self.clients}
                ended = [part for part in ledger.parts.values() if part.done is not None and part.session in present]
                self.rounds.open(rank, {part.session: part.client for part in ended})
                if not self.rounds.is_over(rank):
                    return
        self._depart(rank)
        for session, step in self.steps[rank].openings():
            client = next(client for client in self.clients if client.session == session)
            assert client.stage == "enrolled"
            client.step, client.stage = step, "in"

    def _depart(self, rank: int) -> None:
        for session in self.steps[rank].departures():
            next(client for client in self.clients if client.session == session).lose()

    def deliver(self, rank: int, *, up: bool) -> None:
        """The oldest word of one direction arrives."""
        if up:
            word = self.up[rank].popleft()
            for other, answer in self._answers(rank, word):
                self.down[other].append(answer)
        else:
            self.steps[rank].hear(self.down[rank].popleft())
            self.turn(rank)

    def _answers(self, rank: int, word: State | Stays | Move) -> list[tuple[int, Any]]:
        if isinstance(word, Move):
            return self.assignment.hear_of(rank, word)
        return [(word.rank, word)] if isinstance(word, Stays) else self.coordinator.hear(rank, word)

    def underway(self) -> list[tuple[int, bool]]:
        return [(rank, True) for rank, words in enumerate(self.up) if words] + [
            (rank, False) for rank, words in enumerate(self.down) if words
        ]

    def settle(self) -> None:
        """All words arrive."""
        while underway := self.underway():
            rank, up = underway[0]
            self.deliver(rank, up=up)
            for other in range(len(self.steps)):
                self.turn(other)  # a round may be over

    def add(self, name: str, rank: int, parts: int = 1) -> Client:
        self.clients.append(Client(self, name, rank, parts))
        self.places[name] = rank
        return self.clients[-1]


class Steady(random.Random):
    """Never lets a client pause."""

    def random(self) -> float:
        return 1.0


STEADY = Steady()
