"""What a client has of its link to the server: the channel of the present session, whether it stands, and the run's terms."""

from __future__ import annotations

import threading
from typing import Any

from client_ends.micro import anew
from client_ends.waiting import Stopwatch
from splitfl.channel.client import ClientChannel
from splitfl.errors import SessionLost, SplitflError

__all__ = ["Linked"]


class Linked:
    """While the link is down every call waits; once it is given up, every call raises."""

    def __init__(self) -> None:
        self._channel: ClientChannel | None = None
        self._lock = threading.Condition()
        self._up = True  # the link stands
        self._placed = True  # it is known where this client stands in the steps, and what the server had lost is sent again
        self._reconnect = 0.0  # seconds for which a lost link is tried to be had again
        self._lost: SplitflError | None = None  # why it was given up
        self.waits = Stopwatch()  # what the training thread has waited for others; says nothing where several threads use this

    @property
    def channel(self) -> ClientChannel:
        assert self._channel is not None
        return self._channel

    @property
    def terms(self) -> dict[str, Any]:
        """The run's terms, as the operator set them."""
        return dict(self.channel.welcome.config)

    @property
    def is_up(self) -> bool:
        """Whether what is asked now is sent now; else it waits until the link is had again, or raises."""
        return self._up and self._lost is None

    @property
    def lost(self) -> SplitflError | None:
        """Why every call raises from now on, if it does."""
        return self._lost

    @property
    def _has_barrier(self) -> bool:
        """Whether steps have the same numbers for all."""
        return bool(self.terms["mode"] != "async")

    @property
    def _last_step(self) -> int:
        """How many steps a participant of the whole run takes part in; 0: nobody knows, or there is no end."""
        total: int = self.terms["optimizer"]["steps"]
        return total if self._has_barrier else 0

    def is_due(self, step: int) -> bool:
        """Whether both sides keep their state after ``step``."""
        every: int = self.terms["checkpoint_every"]
        return bool(every and (step + 1) % every == 0) or bool(self._last_step and step + 1 == self._last_step)

    def _check(self) -> None:
        if self._lost is not None:
            raise anew(self._lost)

    def _await_link(self, *, steps: bool = True) -> None:
        """Wait until the link stands, and (``steps``) it is settled where this client stands. The lock is held."""
        with self.waits:
            self._lock.wait_for(lambda: self._lost is not None or (self._up and (self._placed or not steps)))
        self._check()

    def _tell(self, message: Any) -> None:
        """Tell the server; where the link has just broken, whoever connects again tells what matters. The lock is held."""
        try:
            self.channel.tell(message)
        except SessionLost:
            if not self._reconnect:
                raise
