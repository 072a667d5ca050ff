"""Clients whose session was lost, or who were sent to another replica: they connect again by themselves, so a run is not over
while one may. Pure bookkeeping; no clock of its own.
"""

from __future__ import annotations

__all__ = ["ANYBODY", "RETURN", "Absent"]

#: Seconds for which a client that said no goodbye is taken to come again, though no step is held for it: several of its attempts.
RETURN = 120.0
#: Stands for whoever was there before a run was taken up again.
ANYBODY = ""


class Absent:
    """By client, until when its return is waited for; ``now`` is the caller's clock, seconds."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        self.has_returned = False  # whether a client has come since the run was taken up again

    def lost(self, client: str, now: float) -> None:
        self._until[client] = now + RETURN

    def back(self, client: str) -> None:
        self._until.pop(client, None)
        self.has_returned = self.has_returned or ANYBODY in self._until

    def clients(self, now: float) -> set[str]:
        """Who may still come back."""
        return {client for client, until in self._until.items() if until > now}

    def wake(self, now: float) -> float | None:
        """Seconds until :meth:`clients` next changes by itself; None: it will not."""
        left = [until - now for until in self._until.values() if until > now]
        return min(left, default=None)
