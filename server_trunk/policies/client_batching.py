"""Client-batching: whatever waits runs together, up to the token budget."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from server_trunk.members import Member

__all__ = ["ClientBatching"]


#: Micro-batches of fewer tokens than this cost more apart than their client wins by it.
SMALL = 64


class ClientBatching:
    """Fills a batch with what waits, in the order of fairness; what does not fit is passed over for what does.

    One micro-batch a client, unless they are small: who cuts its batch into several wants each answered while the next is on its
    way.
    """

    def choose(self, waiting: Sequence[Member], take: Callable[[Member], bool], busy: Container[str]) -> list[Member]:
        taken: list[Member] = []
        sessions: set[str] = set()
        for member in waiting:
            if (member.session not in sessions or member.tokens < SMALL) and take(member):
                taken.append(member)
                sessions.add(member.session)
        return taken
