"""One client after the other: the baseline of FL-GLM (arXiv 2406.14898), where the server serves clients in turn."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from server_trunk.members import Member

__all__ = ["Serial"]


class Serial:
    """A client whose graphs are kept has the trunk to itself until its backwards have run; no batch mixes clients."""

    def choose(self, waiting: Sequence[Member], take: Callable[[Member], bool], busy: Container[str]) -> list[Member]:
        # A client between its forward and its backward has the trunk; where it waits for itself, others wait too.
        mine = {member.session for member in waiting if member.session in busy}
        taken: list[Member] = []
        for member in waiting:
            if member.forward.grad and busy and member.session not in mine:
                continue
            if (not taken or member.session == taken[0].session) and take(member):
                taken.append(member)
        return taken
