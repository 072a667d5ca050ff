"""What a scheduling policy is asked."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Protocol

from server_trunk.members import Member

__all__ = ["Policy"]


class Policy(Protocol):
    """Chooses among forwards that wait; it changes when they run, never what comes out."""

    def choose(self, waiting: Sequence[Member], take: Callable[[Member], bool], busy: Container[str]) -> list[Member]:
        """The members of the next batch; empty: none yet.

        Args:
            waiting: forwards that may run now, those of the least served clients first.
            take: whether the batch has room for this member too; if so, it has been put in. The first always fits.
            busy: sessions that have forwards whose backward has not run.
        """
