"""No batch mixes clients, and none waits for another: what an asynchronous run needs."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from server_trunk.members import Member

__all__ = ["OneClient"]


class OneClient:
    """A training forward runs alone: a shared batch would have to wait for the slowest member's gradient. Others run together."""

    def choose(self, waiting: Sequence[Member], take: Callable[[Member], bool], busy: Container[str]) -> list[Member]:
        taken: list[Member] = []
        for member in waiting:
            if not (taken and member.forward.grad) and take(member):
                taken.append(member)
        return taken
