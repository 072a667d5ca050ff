"""How a session begins, as the server's I/O thread sees it: a listed peer says Hello and becomes a link; its Open makes the
link a session, with an id, a ticket, keys and credit.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Sequence
from typing import Any

from splitfl.channel.admission import Admission
from splitfl.channel.allowance import Allowance
from splitfl.channel.handler import Peer, ServerHandler
from splitfl.channel.leaving import Leaving
from splitfl.channel.link import Link
from splitfl.channel.offer import Offer, check_room
from splitfl.channel.tally import Tally
from splitfl.channel.timing import Timing
from splitfl.errors import Refused, RemoteProtocolError
from splitfl.protocol.assembly import Inbox, Outbox
from splitfl.protocol.ciphers import choose_cipher
from splitfl.protocol.credit import CreditAccount
from splitfl.protocol.limits import SESSIONS
from splitfl.protocol.messages import (
    DataMessage,
    Open,
    OtherVersionError,
    Redirect,
    RefusalCode,
    decode_hello,
    encode,
)
from splitfl.protocol.messages import Refused as RefusedMessage
from splitfl.protocol.records import Opener, Sealer
from splitfl.transport.base import ServerFrame, ServerTransport
from splitfl.transport.refusals import RefusalLog

__all__ = ["REMOVED", "Entrance"]

# Sessions that one key may have under way to being open.
_HANDSHAKES_A_KEY = 16
# Control connections that one key may have beside its sessions: those, and as many that end or were told no.
_CONNECTIONS_A_KEY = 2 * _HANDSHAKES_A_KEY
# A client may take this long between Welcome and Open (it reads its model meanwhile), seconds.
_OPENING_SECONDS = 900.0

#: Why a client goes whose line was taken out.
REMOVED = "your key was removed from the server's list"


class Entrance:
    """``refusals``: who was turned away, by key; ``leaving``: connections that had their session. Used on the I/O thread only."""

    def __init__(
        self,
        transport: ServerTransport,
        handler: ServerHandler,
        admission: Admission,
        offer: Offer,
        timing: Timing,
        clock: Callable[[], float],
        refusals: RefusalLog,
        leaving: Leaving,
    ) -> None:
        self._transport, self._handler, self._admission = transport, handler, admission
        self._offer, self._timing, self._clock = offer, timing, clock
        self._allowances: dict[str, Allowance] = {}  # by the client's key
        self._refusals, self._leaving = refusals, leaving

    def greet(self, frame: ServerFrame, links: Collection[Link]) -> Link | None:
        """A message of a peer without a session: its first, which must be a Hello, else the connection is cut. Its key was on the
        list when it connected; it must be still. Of a connection that has had its session, or a no, messages are only counted.
        """
        if self._leaving.is_gone(frame.endpoint, frame.peer):
            return None
        # Charged first: what comes after a no is counted, and not looked up.
        allowance = self._allowances.get(frame.user)
        if allowance is None:
            allowance = self._allowances[frame.user] = Allowance({}, self._clock)
        floods = not allowance.control(len(frame.frame))
        if not floods and (frame.endpoint, frame.peer) in self._leaving:
            return None
        found = self._admission.peer(frame.user, frame.address)
        if found is None:
            return None
        peer, listed = found
        if floods:
            self._turn_out(frame, peer, "more control messages than a client has use for")
            return None
        most = int(peer.limits.get("sessions", SESSIONS)) + _CONNECTIONS_A_KEY
        if self._transport.connected(frame.user) > most:
            self._turn_out(frame, peer, "more connections than a client has use for")
            return None
        try:
            decode_hello(bytes(frame.frame))
        except OtherVersionError:
            pass  # answered with a Refused like any Hello that does not fit
        except RemoteProtocolError as error:
            self._turn_out(frame, peer, f"no Hello: {error}")
            return None
        underway = sum(other.peer.public_key == peer.public_key and not other.attached for other in links)
        if not listed or underway >= _HANDSHAKES_A_KEY or allowance.sessions.wait() > 0:
            code = RefusalCode.FULL if listed else RefusalCode.NOT_AUTHORIZED
            text = "too many sessions of your key are opening" if listed else REMOVED
            self._transport.send_control(frame.peer, encode(RefusedMessage(code, text)))
            # By its key: it may come again as fast as it can.
            self._refusals.refused(frame.user, peer.who, code, text)
            return None
        allowance.sessions.take(1)
        allowance.limit(peer.limits)
        now = self._clock()
        return Link(frame.peer, peer, now, now + _OPENING_SECONDS, Tally(self._timing.overdue), allowance)

    def _turn_out(self, frame: ServerFrame, peer: Peer, text: str) -> None:
        self._leaving.cut(frame.endpoint, frame.peer)
        # Apart from what is answered: five of those would hide it.
        self._refusals.refused(frame.user, peer.who, RefusalCode.PROTOCOL, f"{text}: the connection is cut", kind="cut")

    def admit(self, link: Link, message: Open, others: Sequence[str]) -> tuple[str, int] | Redirect:
        """Whether this client may have a session beside ``others``, its own that are open: its cipher and the step that the run
        stands at, or where else it shall go. Raises Refused, RemoteProtocolError.
        """
        cipher = choose_cipher(message.ciphers, self._offer.ciphers)
        if cipher is None:
            raise Refused(
                RefusalCode.CIPHER,
                f"the server has none of the client's ciphers; it has {', '.join(self._offer.ciphers)}",
            )
        check_room(link.peer, others, message.replaces, self._timing.silence)
        step = self._handler.admit(link.peer, message)
        return self._handler.elsewhere(link.peer) or (cipher, step)

    def open(
        self,
        link: Link,
        cipher: str,
        step: int,
        *,
        admit: Callable[[DataMessage], None],
        charge: Callable[[int], None],
    ) -> bytes:
        """Make the link a session; returns the frame of Opened. The lock that guards the link is held. ``admit``, ``charge``:
        what is asked when a data message begins.
        """
        session = secrets.token_hex(8)
        window, max_message = self._offer.sizes_for(link.peer)
        _, frame = link.session.send_opened(
            session=session,
            ticket=self._admission.ticket(session),
            ticket_seconds=self._admission.ticket_seconds,
            data_address=self._transport.data_address,
            cipher=cipher,
            window=window,
            max_message=max_message,
            record=self._offer.record,
            step=step,
            bulk=self._offer.bulk,
        )
        keys = link.session.secrets
        assert keys is not None
        link.id, link.account, link.max_message = session, CreditAccount(window), max_message
        sealer = Sealer(keys.server, cipher, aead_factory=self._offer.aead_factory, make_frame=self._transport.make_frame)
        link.outbox = Outbox(sealer, self._offer.record)
        link.inbox = Inbox(
            Opener(keys.client, cipher, aead_factory=self._offer.aead_factory),
            from_client=True,
            record_bytes=self._offer.record,
            max_message=self._offer.max_message,
            allocate=lambda message: self._allocate(link, message),
            admit=admit,
            charge=charge,
        )
        link.deadline = self._clock() + self._admission.ticket_seconds + self._timing.silence
        return frame

    def _allocate(self, link: Link, message: DataMessage) -> tuple[Any, memoryview]:
        return self._handler.allocate(link.id, message)
