"""Which replica a client goes to: where the least load is, and from then on the same one. Pure bookkeeping."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["Assignment"]


class Assignment:
    """Load is what a replica's clients bring to a step, in tokens. A client that has not trained yet is expected to bring the
    mean of the others. To move a client between steps one would change :attr:`places`, and end its session with the word where
    to go.
    """

    def __init__(self, size: int) -> None:
        self.places: dict[str, int] = {}  # by client, kept while the replica lives
        self._present: list[Mapping[str, float]] = [{} for _ in range(size)]
        self._coming: set[str] = set()  # assigned, not seen there yet

    def hear(self, rank: int, tokens: Mapping[str, float]) -> None:
        """Who is at a replica, and the tokens a step of each; 0 where it has not trained yet."""
        self._present[rank] = tokens
        self._coming -= tokens.keys()
        for client in tokens:
            self.places.setdefault(client, rank)  # it went there by itself

    def place(self, client: str) -> int:
        """The replica that ``client`` goes to."""
        if client not in self.places:
            loads = self._loads()
            self.places[client] = loads.index(min(loads))
        if all(client not in tokens for tokens in self._present):
            self._coming.add(client)
        return self.places[client]

    def _loads(self) -> list[float]:
        known = [each for tokens in self._present for each in tokens.values() if each]
        mean = sum(known) / len(known) if known else 1.0
        loads = [sum(each or mean for each in tokens.values()) for tokens in self._present]
        for client in self._coming:
            loads[self.places[client]] += mean
        return loads
