"""What both ends of the ZeroMQ transport share: socket options, the wake-up, and the allocator's thresholds."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import socket
import sys
from typing import Any

import zmq

from splitfl.protocol.assembly import MAX_FRAME_BYTES
from splitfl.protocol.ciphers import Buffer
from splitfl.protocol.keys import Identity, PublicKey

# Frames queued for one peer. The high-water mark counts messages: 16 frames of 1 MiB bound a slow peer to 16 MiB.
DATA_FRAMES_QUEUED = 16
# At the client one, on its way to the server, while another is written to the socket: with more of them the bulk's threads go on
# for longer at a stretch, while a control message waits for a core, and what waits is driven out of the caches. (A server only
# looks now and then whether a full queue has room again: its own must last.)
FRAMES_TO_SERVER = 1
# Control frames of one client, at most 64 KiB each, that may wait for the server to take them.
CONTROL_FRAMES_QUEUED = 64
# Frames, and bytes, taken from one socket before the other sockets are looked at again: a control message that comes meanwhile
# waits for as many frames to be opened.
FRAMES_A_TURN = 32
BYTES_A_TURN = 2**20
# A peer that has not finished its handshake by then is cut.
HANDSHAKE_MILLISECONDS = 5000
# Dead TCP connections are the kernel's to reap; the channel's heartbeats decide when a session is lost. Not ZMTP's heartbeats:
# one that is due on a connection that broke while its queue was full ends the process by a failed assertion (libzmq 4.3.5). A
# peer's own heartbeat does so too, so a server's queues have no mark at which they are full (:func:`never_full`).
_KEEPALIVE_SECONDS, _KEEPALIVE_TIMES = 10, 2

PLAIN_USER = b"splitfl"
# What CURVE adds to a frame (RFC 26, MESSAGE): its name, a nonce, flags, a tag.
CURVE_BYTES = 33


def common_options(sock: zmq.Socket[bytes], *, max_frame: int, ipv6: bool) -> None:
    """Options of every socket that faces the network."""
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.MAXMSGSIZE, max_frame)
    sock.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MILLISECONDS)
    sock.setsockopt(zmq.TCP_KEEPALIVE, 1)
    sock.setsockopt(zmq.TCP_KEEPALIVE_IDLE, _KEEPALIVE_SECONDS)
    sock.setsockopt(zmq.TCP_KEEPALIVE_INTVL, _KEEPALIVE_SECONDS)
    sock.setsockopt(zmq.TCP_KEEPALIVE_CNT, _KEEPALIVE_TIMES)
    # What was sent and is never acknowledged: no keepalive is sent meanwhile.
    sock.setsockopt(zmq.TCP_MAXRT, 1000 * _KEEPALIVE_SECONDS * (1 + _KEEPALIVE_TIMES))
    sock.setsockopt(zmq.IPV6, int(ipv6))


def data_options(sock: zmq.Socket[bytes]) -> None:
    """Options of the data sockets on top of the common ones."""
    sock.setsockopt(zmq.SNDHWM, DATA_FRAMES_QUEUED)


def client_data_options(sock: zmq.Socket[bytes]) -> None:
    """Of a client's data socket: what the server sends faster than it is taken waits in the server."""
    sock.setsockopt(zmq.SNDHWM, FRAMES_TO_SERVER)
    sock.setsockopt(zmq.RCVHWM, DATA_FRAMES_QUEUED)


def data_frame_limit(frame: int, *, curve: bool) -> int:
    """The largest frame of the data endpoint, bytes: one of records, and what CURVE puts around it."""
    return frame + CURVE_BYTES * curve


def never_full(sock: zmq.Socket[bytes]) -> None:
    """Of a server's sockets: ZeroMQ takes whatever comes. What one client may have waiting there is bounded by its credit, and by
    the watch over each connection's account, which cuts it.
    """
    sock.setsockopt(zmq.RCVHWM, 0)


def curve_client(sock: zmq.Socket[bytes], server_key: PublicKey, identity: Identity) -> None:
    """CURVE with a pinned server."""
    sock.setsockopt(zmq.CURVE_SERVERKEY, server_key.raw)
    sock.setsockopt(zmq.CURVE_PUBLICKEY, identity.public.raw)
    sock.setsockopt(zmq.CURVE_SECRETKEY, identity.secret)


def curve_server(sock: zmq.Socket[bytes], identity: Identity) -> None:
    """CURVE's other side."""
    sock.setsockopt(zmq.CURVE_SERVER, 1)
    sock.setsockopt(zmq.CURVE_PUBLICKEY, identity.public.raw)
    sock.setsockopt(zmq.CURVE_SECRETKEY, identity.secret)


def plain_client(sock: zmq.Socket[bytes], ticket: bytes) -> None:
    """PLAIN with a ticket."""
    sock.setsockopt(zmq.PLAIN_USERNAME, PLAIN_USER)
    # As text: an option of libzmq that is documented as a string should not hold zero bytes.
    sock.setsockopt(zmq.PLAIN_PASSWORD, ticket.hex().encode())


def make_frame(size: int) -> bytearray | memoryview:
    """Writable memory for a frame, which :func:`send_frame` gives away. Large ones are ZeroMQ's own: it frees them where
    it has sent them, while lent memory of Python's would cost a turn of another thread, and of the interpreter's lock, for each.
    """
    template = _template() if size >= zmq.COPY_THRESHOLD else None
    if template is None or size > len(template):
        return bytearray(size)
    owned: Any = zmq.Frame(template[:size], copy=True)
    return memoryview(owned)


def send_frame(sock: zmq.Socket[bytes], frame: Buffer) -> None:
    """Queues a frame that nobody changes any more. Raises zmq.Again."""
    owned = frame.obj if isinstance(frame, memoryview) else None
    sock.send(owned if isinstance(owned, zmq.Frame) else frame, zmq.NOBLOCK, copy=False)


@functools.cache
def _template() -> memoryview | None:
    """What a new frame is copied from, as pyzmq makes none without; None where its frames cannot be written to."""
    try:
        probe: Any = zmq.Frame(b"\0", copy=True)
        if memoryview(probe).readonly:
            return None
    except TypeError:  # pyzmq for PyPy
        return None
    size = MAX_FRAME_BYTES
    if os.name != "posix":
        return memoryview(bytes(size))
    # Never written to, so every page of it is the kernel's one page of zeros, which stays in the nearest cache.
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ))


def bracketed(host: str) -> str:
    """A host as it stands in an address."""
    return f"[{host}]" if ":" in host else host


class Wake:
    """Lets other threads end a poll. Plain sockets, since a ZeroMQ socket belongs to one thread."""

    def __init__(self) -> None:
        self.receiver, self._sender = socket.socketpair()
        self.receiver.setblocking(False)
        self._sender.setblocking(False)
        self._is_set = False

    def set(self) -> None:
        # Whoever finds it set has left its work before it looked; the poller works only after it has cleared it.
        if self._is_set:
            return
        self._is_set = True
        # A full buffer means that a wake-up is under way already; a closed socket, that nobody polls any more.
        with contextlib.suppress(OSError):
            self._sender.send(b"\0")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while len(self.receiver.recv(4096)) == 4096:
                pass
        self._is_set = False

    def close(self) -> None:
        self.receiver.close()
        self._sender.close()


@functools.cache
def keep_large_buffers() -> bool:
    """Tells glibc to serve buffers below 32 MiB from its heap and to keep 128 MiB free: else every record of 1 MiB is
    mapped, faulted in page by page, and unmapped again. Elsewhere there is nothing to tell; returns whether it took.
    """
    if not sys.platform.startswith("linux"):
        return False
    m_trim_threshold, m_mmap_threshold = -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has no mallopt
        return False
    return bool(mallopt(m_mmap_threshold, 32 * 2**20) and mallopt(m_trim_threshold, 128 * 2**20))
