"""Who is at which replica, and whose return is waited for: whether anybody of the run is left. Pure bookkeeping, at rank 0."""

from __future__ import annotations

from server_trunk.replicas.words import Presence

__all__ = ["Attendance"]


class Attendance:
    """A client that was lost at one replica, or sent away by it, may come again at another: then nobody waits for it any more,
    whatever the first one says.
    """

    def __init__(self, size: int) -> None:
        self._said = [Presence()] * size
        self._back: list[set[str]] = [set() for _ in range(size)]  # by replica: whom it awaits who has been elsewhere since

    def hear(self, rank: int, presence: Presence) -> None:
        """What a replica says of itself."""
        self._said[rank] = presence
        for place, said in enumerate(self._said):
            elsewhere = {client for other, each in enumerate(self._said) if other != place for client in each.here}
            self._back[place] = {client for client in said.awaited if client in self._back[place] or client in elsewhere}

    @property
    def is_over(self) -> bool:
        """Whether a step has closed, or none will, and nobody is here or may come again."""
        said = self._said
        trained, here = any(each.trained for each in said), any(each.here for each in said)
        return trained and not here and all(back.issuperset(each.awaited) for each, back in zip(said, self._back, strict=True))
