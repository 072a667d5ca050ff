"""Options of the sockets that face the network: what a peer sends must not end the process."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import threading

import zmq

from splitfl.transport.zmq_common import common_options, never_full


def test_dead_connections_are_the_kernels_to_reap() -> None:
    """A ZMTP heartbeat that is due on a connection that broke while its queue was full ends the process."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as sock:
        common_options(sock, max_frame=1024, ipv6=False)
        assert sock.getsockopt(zmq.HEARTBEAT_IVL) == 0
        assert sock.getsockopt(zmq.TCP_KEEPALIVE) == 1
        seconds = [sock.getsockopt(option) for option in (zmq.TCP_KEEPALIVE_IDLE, zmq.TCP_KEEPALIVE_INTVL)]
        assert seconds == [10, 10]
        assert sock.getsockopt(zmq.TCP_MAXRT) == 30_000


def test_a_peers_heartbeat_behind_more_than_is_taken_ends_no_process() -> None:
    """In a process of its own, which a failed assertion in libzmq would end."""
    done = subprocess.run([sys.executable, "-c", f"from {__name__} import attacked; attacked()"], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


def attacked() -> None:
    """A peer sends more than a queue would hold, then a heartbeat, breaks the connection; and only now is anything taken."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    common_options(router, max_frame=1024, ipv6=False)
    never_full(router)
    peer = socket.create_connection(("127.0.0.1", router.bind_to_random_port("tcp://127.0.0.1")))
    peer.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32))
    command = b"\x05READY\x0bSocket-Type\0\0\0\x06DEALER"
    peer.sendall(bytes([4, len(command)]) + command)
    assert len(peer.recv(64, socket.MSG_WAITALL)) == 64
    assert peer.recv(4096)  # READY
    heartbeat = b"\x04PING\0\0"
    peer.sendall(b"\0\x01x" * 2000 + bytes([4, len(heartbeat)]) + heartbeat + b"\0\x01x")
    threading.Event().wait(0.3)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    taken = 0
    while router.poll(500):
        router.recv_multipart()
        taken += 1
    assert taken <= 2001
    context.destroy(0)
