"""Client-batching: whatever waits runs together, up to the token budget."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from server_trunk.members import Member

__all__ = ["ClientBatching"]


class ClientBatching:
    """Fills a batch with what waits, in the order of fairness; what does not fit is passed over for what does."""

    def choose(self, waiting: Sequence[Member], take: Callable[[Member], bool], busy: Container[str]) -> list[Member]:
        return [member for member in waiting if take(member)]
