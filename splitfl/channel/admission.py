"""Who may join: the gate that the transport asks, and the single-use tickets of the data endpoint."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from splitfl.channel.handler import Peer
from splitfl.errors import KeyFileError
from splitfl.protocol.control import TICKET_BYTES
from splitfl.protocol.keys import AuthorizedClients, PublicKey


class Admission:
    """A :class:`splitfl.transport.base.Gate` over the list of authorized clients. Used on the I/O thread only."""

    def __init__(self, authorized: AuthorizedClients, ticket_seconds: int, clock: Callable[[], float]) -> None:
        self._authorized, self.ticket_seconds, self._clock = authorized, ticket_seconds, clock
        self._generation = authorized.generation
        self._tickets: dict[bytes, tuple[str, float]] = {}

    def admit_key(self, key: PublicKey, address: str) -> str | None:
        """The user of a connection on the control endpoint: its key's text."""
        return str(key) if self._authorized.lookup(key) is not None else None

    def admit_ticket(self, ticket: bytes, address: str) -> str | None:
        """The user of a connection on the data endpoint: its session. A ticket works once."""
        session, expires = self._tickets.pop(ticket, ("", 0.0))
        return session if session and self._clock() < expires else None

    def ticket(self, session: str) -> bytes:
        """A fresh ticket for this session."""
        ticket = secrets.token_bytes(TICKET_BYTES)
        self._tickets[ticket] = session, self._clock() + self.ticket_seconds
        return ticket

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

    def changed(self) -> bool:
        """Whether the list has been edited since the last call."""
        self._authorized.refresh()
        # Not refresh's own answer: a connection that was judged since then has seen, and swallowed, the change.
        known, self._generation = self._generation, self._authorized.generation
        return known != self._generation

    def lists(self, peer: Peer) -> bool:
        """Whether the list has this peer now."""
        return self._authorized.lookup(peer.public_key) is not None
