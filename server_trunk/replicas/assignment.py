"""Which replica a client goes to: where the least load is, and from then on the same one until it is moved. Pure bookkeeping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server_trunk.replicas.words import Move

__all__ = ["COMING", "REST", "Assignment"]

#: A client is moved where that takes this share off the greatest load, and once it has been where it is for so many steps: a few
#: do not say what it brings, and its new session costs a handshake, during which a step stands still.
WORTH, REST = 0.2, 20
#: Seconds after which a client that was sent to a replica, and was not seen there, weighs nothing there any more.
COMING = 60.0


@dataclass(slots=True)
class _Coming:
    """A client that was assigned, and not seen there, ``since`` then. ``tokens``: what it brings, 0 where that is unknown."""

    tokens: float
    since: float


class Assignment:
    """Load is what a replica's clients bring to a step, in tokens. A client that has not trained yet is expected to bring the
    mean of the others. ``now`` is the caller's clock, seconds.
    """

    def __init__(self, size: int) -> None:
        self.places: dict[str, int] = {}  # by client, kept while the replica lives
        self._decided: dict[str, Move] = {}  # by client that was moved: the newest decision about it
        self._count = 0  # of those decisions
        self._present: list[Mapping[str, float]] = [{} for _ in range(size)]
        self._coming: dict[str, _Coming] = {}
        self._since: dict[str, int] = {}  # by client: the step after which it was moved, or could first have been
        self._direct: set[str] = set()  # clients that were not sent where they are: they would dial the same replica again

    def hear(self, rank: int, tokens: Mapping[str, float]) -> None:
        """Who is at a replica, and the tokens a step of each; 0 where it has not trained yet."""
        # Who has moved on may still be reported from where it was; whoever is there by itself has no other place.
        self._direct |= tokens.keys() - self.places.keys()
        here = {client: each for client, each in tokens.items() if self.places.setdefault(client, rank) == rank}
        # After a move a client is counted anew.
        self._present[rank] = {client: each or self._expected(client) for client, each in here.items()}
        for client, each in here.items():
            if each or not self._expected(client):
                self._coming.pop(client, None)

    def _expected(self, client: str) -> float:
        coming = self._coming.get(client)
        return 0.0 if coming is None else coming.tokens

    def place(self, client: str, now: float = 0.0) -> int:
        """The replica that ``client`` goes to."""
        if client not in self.places:
            loads = self._loads(now)
            self.places[client] = loads.index(min(loads))
        self._direct.discard(client)
        if all(client not in tokens for tokens in self._present):
            self._coming[client] = _Coming(self._expected(client), now)
        return self.places[client]

    def rebalance(self, step: int, movable: Sequence[Sequence[str]], now: float = 0.0, *, at_once: bool = True) -> Move | None:
        """Who of the ``movable`` clients of each replica is to go from the most to the least loaded one after ``step``, if that
        is worth it. ``at_once``: from now on it is sent there; else once the replica that it leaves lets go of it.
        """
        for client in (each for clients in movable for each in clients):
            self._since.setdefault(client, step)
        loads = self._loads(now)
        origin, target = loads.index(max(loads)), loads.index(min(loads))
        present = self._present[origin]
        worth = [
            (max(loads[origin] - present[client], loads[target] + present[client]), client)
            for client in movable[origin]
            if present.get(client) and client not in self._direct and step - self._since[client] >= REST
        ]
        lowest, client = min(worth, default=(loads[origin], ""))
        if origin == target or lowest > (1 - WORTH) * loads[origin]:
            return None
        self._since[client] = step
        return self.decide(client, origin, target, now, at_once=at_once)

    def decide(self, client: str, origin: int, target: int, now: float = 0.0, *, at_once: bool = True) -> Move:
        """The client is to move; every replica is to hear so."""
        self._count += 1
        self._decided[client] = move = Move(client, origin, target, self._count)
        if at_once:
            self._goes(move, now)
        return move

    def hear_of(self, rank: int, move: Move, now: float = 0.0) -> list[tuple[int, Move]]:
        """A replica lets go of a client, or, where it is the target, asks for it, as it has come there by itself. Returns whom
        to tell. Whoever has yet to hear of a newer decision is passed over: it will, and acts on that.
        """
        newest = self._decided.get(move.client)
        if newest is None or newest.number != move.number:
            return []
        if rank == move.target:
            self._direct.add(move.client)
            return [(move.origin, move)]
        if newest.target == move.target:  # as decided
            self._goes(move, now)
            return []
        decided = self.decide(move.client, move.origin, move.target, now)
        return [(other, decided) for other in range(len(self._present))]

    def _goes(self, move: Move, now: float) -> None:
        """From now on the client belongs where it moves to, and is sent there."""
        if self.places[move.client] == move.target:
            return
        present = dict(self._present[move.origin])
        tokens = present.pop(move.client, 0.0)
        self._present[move.origin], self.places[move.client] = present, move.target
        self._coming[move.client] = _Coming(tokens, now)

    def _loads(self, now: float) -> list[float]:
        known = [each for tokens in self._present for each in tokens.values() if each]
        mean = sum(known) / len(known) if known else 1.0
        loads = [sum(each or mean for each in tokens.values()) for tokens in self._present]
        awaited = {client: each for client, each in self._coming.items() if client not in self._present[self.places[client]]}
        for client, each in awaited.items():
            if now - each.since < COMING:
                loads[self.places[client]] += each.tokens or mean
            else:
                del self._coming[client]
        return loads
