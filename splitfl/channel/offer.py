"""What a server offers a session, and whether a client may have another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitfl.channel.handler import Peer
from splitfl.errors import Refused
from splitfl.protocol.ciphers import AeadFactory
from splitfl.protocol.control import SEALED
from splitfl.protocol.limits import SESSIONS
from splitfl.protocol.messages import RefusalCode


@dataclass(frozen=True)
class Offer:
    """What the server offers every session; sizes in bytes, see :class:`splitfl.protocol.messages.Opened`."""

    window: int
    max_message: int
    record: int
    ciphers: tuple[str, ...]
    aead_factory: AeadFactory
    bulk: str = SEALED

    def sizes_for(self, peer: Peer) -> tuple[int, int]:
        """Window and largest message of this client."""
        window = min(self.window, int(peer.limits.get("window", self.window)))
        return window, min(self.max_message, window)


def check_room(peer: Peer, others: Sequence[str], replaces: str, silence: float) -> None:
    """Whether a client that has the sessions ``others`` may open another; ``replaces``, which it has lost, is not counted.

    Raises Refused. ``silence``: seconds after which the server takes a session for lost by itself.
    """
    limit = int(peer.limits.get("sessions", SESSIONS))
    if sum(other != replaces for other in others) >= limit:
        raise Refused(
            RefusalCode.FULL,
            f"your key may have {limit} sessions at a time, and has them: close one, or wait until the server has noticed that "
            f"it is gone ({silence:g} s); the operator can allow more, by sessions=N in your key's line",
        )
