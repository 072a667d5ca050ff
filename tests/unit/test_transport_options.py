"""Options of the sockets that face the network."""

from __future__ import annotations

import zmq

from splitfl.transport.zmq_common import common_options


def test_dead_connections_are_the_kernels_to_reap() -> None:
    """A ZMTP heartbeat that is due on a connection that broke while its queue was full ends the process."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as sock:
        common_options(sock, max_frame=1024, ipv6=False)
        assert sock.getsockopt(zmq.HEARTBEAT_IVL) == 0
        assert sock.getsockopt(zmq.TCP_KEEPALIVE) == 1
        seconds = [sock.getsockopt(option) for option in (zmq.TCP_KEEPALIVE_IDLE, zmq.TCP_KEEPALIVE_INTVL)]
        assert seconds == [10, 10]
        assert sock.getsockopt(zmq.TCP_MAXRT) == 30_000
