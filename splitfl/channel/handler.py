"""What a server does with its sessions: the channel calls, the gateway answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from splitfl.protocol.keys import PublicKey
from splitfl.protocol.limits import Limit
from splitfl.protocol.messages import ControlMessage, DataMessage, Hello, Open, Redirect, Welcome


@dataclass(frozen=True)
class Peer:
    """Who is at the other end: ``name`` and ``limits`` are the operator's, from the list of authorized clients."""

    public_key: PublicKey
    name: str
    address: str
    limits: Mapping[str, Limit] = field(default_factory=dict)

    @property
    def who(self) -> str:
        """For logs."""
        return f"{self.name} at {self.address}, key {self.public_key}"


@dataclass(frozen=True)
class SessionInfo:
    """A session that has just opened."""

    session: str
    peer: Peer
    open: Open
    hello: Hello


class ServerHandler(Protocol):
    """All methods run on the channel's I/O thread and must not block. An exception ends the session it is about (a
    Refused or RemoteProtocolError with its own words, any other with a line in the log), never the server.
    """

    def welcome(self, peer: Peer, hello: Hello) -> Welcome:
        """Answers Hello; raises Refused."""

    def admit(self, peer: Peer, open: Open) -> int:
        """Judges Open; returns the run's open step, or the next to open. Raises Refused."""

    def elsewhere(self, peer: Peer) -> Redirect | None:
        """Which other endpoint of the server takes this client, which was admitted; None: this one does."""

    def on_opened(self, session: SessionInfo) -> None:
        """Both connections stand, keys are proven. Each on_opened is followed by one on_closed."""

    def allocate(self, session: str, message: DataMessage) -> tuple[Any, memoryview]:
        """(object handed to on_data, writable view of exactly ``message.payload_bytes`` bytes); the credit has been
        checked.
        """

    def on_data(self, session: str, message: DataMessage, payload: Any) -> None:
        """A complete, verified data message. ``payload`` is the object from ``allocate``; None where it carries none."""

    def on_control(self, session: str, message: ControlMessage) -> None:
        """Enrol, StepDone, AskNorm, Pause, Leave or Ends."""

    def on_refused(self, who: str, code: str, text: str) -> None:
        """Somebody was not let in. For the log."""

    def on_closed(self, session: str, reason: str, *, lost: bool) -> None:
        """The session is over; nothing more comes from it and nothing more goes to it. ``lost``: neither side has ended it, or
        its client without a Leave, so it may come again.
        """
