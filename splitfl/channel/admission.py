"""Who may join: the gate that the transport asks, and the single-use tickets of the data endpoint."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Mapping

from splitfl.channel.handler import Peer
from splitfl.errors import KeyFileError
from splitfl.protocol.control import CURVE, SEALED, TICKET_BYTES
from splitfl.protocol.keys import AuthorizedClients, Identity, PublicKey
from splitfl.protocol.limits import Limit
from splitfl.transport.base import Endpoint


class Admission:
    """A :class:`splitfl.transport.base.Gate` over the list of authorized clients. Used on the I/O thread only."""

    def __init__(
        self, authorized: AuthorizedClients, ticket_seconds: int, clock: Callable[[], float], bulk: str = SEALED
    ) -> None:
        self._authorized, self.ticket_seconds, self._clock, self._bulk = authorized, ticket_seconds, clock, bulk
        self._generation = self._seen = authorized.generation
        self._tickets: dict[bytes, tuple[str, float]] = {}
        self._given: deque[float] = deque()  # when each ticket expires, used or not

    def admit_key(self, key: PublicKey, address: str) -> str | None:
        """The user of a connection on the control endpoint: its key's text."""
        return str(key) if self._authorized.lookup(key) is not None else None

    def admit_ticket(self, shown: bytes, address: str) -> str | None:
        """The user of a connection on the data endpoint: its session. A ticket works once. ``shown``: the ticket, or the public
        key of the one that is a CURVE secret.
        """
        session, expires = self._tickets.pop(shown, ("", 0.0))
        return session if session and self._clock() < expires else None

    def ticket(self, session: str) -> bytes:
        """A fresh ticket for this session."""
        ticket = secrets.token_bytes(TICKET_BYTES)
        shown = Identity.from_secret(ticket).public.raw if self._bulk == CURVE else ticket
        self._given.append(self._clock() + self.ticket_seconds)
        self._tickets[shown] = session, self._given[-1]
        return ticket

    def expected(self, endpoint: Endpoint) -> int:
        """Connections that clients may be about to make: see :class:`splitfl.transport.base.Gate`."""
        # A ticket counts on when it was shown: its connection has said nothing before its first record.
        return len(self._authorized) if endpoint is Endpoint.CONTROL else len(self._given)

    def peer(self, user: str, address: str) -> tuple[Peer, bool] | None:
        """Who a user of the control endpoint is, and whether the list still has it; None when it is no key at all."""
        try:
            key = PublicKey.parse(user)
        except KeyFileError:
            return None
        client = self._authorized.lookup(key)
        if client is None:
            return Peer(key, "unlisted", address), False
        return Peer(key, client.name, address, dict(client.limits)), True

    def expire(self) -> None:
        """Forgets tickets that are too old."""
        now = self._clock()
        for ticket, (_, expires) in list(self._tickets.items()):
            if now >= expires:
                del self._tickets[ticket]
        while self._given and now >= self._given[0]:
            self._given.popleft()

    def changed(self) -> bool:
        """Whether the list has been edited, and has stayed as it is since the last call: an editor may move a file away, or empty
        it, before it writes it, and nobody's session may end for that.
        """
        self._authorized.refresh()
        # Not refresh's own answer: a connection that was judged since then has seen, and swallowed, the change.
        seen, self._seen = self._seen, self._authorized.generation
        if seen != self._seen:
            return False
        known, self._generation = self._generation, seen
        return known != seen

    def limits(self, peer: Peer) -> Mapping[str, Limit] | None:
        """This peer's limits on the list as ``changed`` has seen it, as at this moment the file may be away; None where it is not
        on it.
        """
        client = self._authorized.known(peer.public_key)
        return client.limits if client is not None else None
