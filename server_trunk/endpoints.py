"""Where clients reach the server: the sealed channel over its transport, and the way out to them."""

from __future__ import annotations

import socket
from typing import Any

from splitfl.channel.server import ServerChannel
from splitfl.config import RunConfig
from splitfl.protocol.join import JoinString
from splitfl.protocol.keys import AuthorizedClients, Identity
from splitfl.protocol.messages import Fault
from splitfl.transport.zmq_server import ZmqServerTransport

__all__ = ["Endpoints"]


class Endpoints:
    """The server's :class:`~server_trunk.outlet.Outlet`. Closed until :meth:`open`, and again after :meth:`close`."""

    def __init__(
        self, config: RunConfig, identity: Identity, authorized: AuthorizedClients, transport: Any = None, **channel_options: Any
    ) -> None:
        """``transport``: in place of sockets. ``channel_options``: further arguments of :class:`ServerChannel`."""
        self._config, self._identity, self._authorized = config, identity, authorized
        self._transport, self._channel_options = transport, channel_options
        self._channel: ServerChannel | None = None
        self.are_open = False
        self.join: JoinString | None = None  # what clients need, once open

    def open(self, handler: Any) -> tuple[str, int]:
        """Bind both; returns where clients reach the one for control. Raises ConfigError where an address cannot be bound."""
        config = self._config
        host, port = config.address
        if self._transport is None:
            self._transport = ZmqServerTransport(
                self._identity, host=host, port=port, data_port=config.data_port, advertise=config.advertise or None
            )
        channel = ServerChannel(
            self._transport,
            handler,
            authorized=self._authorized,
            window=config.window,
            max_message=config.window,
            bulk=config.bulk,
            **self._channel_options,
        )
        channel.start()
        self._channel, self.are_open = channel, True
        # What is bound to all interfaces is reached under this machine's name, where the operator says no other.
        reached = config.host or (socket.getfqdn() if host in ("*", "0.0.0.0", "::") else host)
        self.join = JoinString(self._identity.public, reached, self._transport.control_port, config.run)
        return reached, self._transport.control_port

    def close(self, text: str, *, back: bool) -> None:
        """Send what is queued, tell every client why. ``back``: the server means to start again, so that clients wait for it."""
        if self.are_open:
            self.are_open = False
            self.channel.stop(text, back=back)

    @property
    def failure(self) -> BaseException | None:
        """Why nobody can come any more."""
        return self.channel.failure if self.are_open else None

    # --- from any thread --------------------------------------------------------------------------------------------------------

    @property
    def channel(self) -> ServerChannel:
        """Once it has been open."""
        assert self._channel is not None
        return self._channel

    def traffic(self) -> dict[str, tuple[int, int]]:
        """Bytes of frames (received, sent) by client's name, also of what is closed."""
        return self._channel.traffic() if self._channel is not None else {}

    def send(self, session: str, message: Any, payload: Any) -> None:
        self.channel.send(session, message, payload)

    def tell(self, session: str, message: Any) -> None:
        self.channel.tell(session, message)

    def credit(self, session: str, n: int) -> None:
        self.channel.credit(session, n)

    def end(self, session: str, fault: Fault) -> None:
        self.channel.end(session, fault)
