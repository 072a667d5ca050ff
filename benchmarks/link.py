"""A network link on loopback: a relay process that gives what passes it a delay and a bandwidth, and changes no byte.

Each direction of a link is a queue of its own: a byte that has arrived leaves when the link has carried all before it at the
given rate, and reaches the other side one delay later, however much is under way. The connections of one link share its rate in
turns; what it has not yet carried is held to a small buffer a connection, so that a sender meets back pressure as on a network.
What a real path adds on top is not here: loss, jitter, and a kernel whose TCP window is smaller than rate times delay.

    ports = {port: server_port, data_port: server_data_port}
    with Link(ports) as link:                     # one link, at 127.0.0.1; Link(ports, links=3) adds 127.0.0.2 and 127.0.0.3
        link.shape(delay=0.025, rate=25e6)        # 50 ms round trip, 200 Mbit/s each way
        up, down = link.carried()[0]              # bytes so far
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import select
import socket
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["Link", "host_of", "round_trip"]

# What one connection may have waiting before the link: a router's buffer of a few milliseconds.
_BUFFER = 1 << 20
_READ = 1 << 18
# A connection's turn, seconds of the link's time: shorter ones cost CPU, in longer ones messages wait for each other.
_TURN = 0.001
_SMALLEST_TURN, _LARGEST_TURN = 1500, 1 << 18
# The link's time is given away this far ahead, so that the process need not wake for each turn.
_AHEAD = 0.002


def host_of(link: int) -> str:
    """The address at which the link of this number listens."""
    return f"127.0.0.{link + 1}"


def round_trip(milliseconds: float, megabits: float) -> dict[str, float]:
    """Arguments of :meth:`Link.shape` for a round trip in ms and a bandwidth in Mbit/s (10^6 bit/s) each way."""
    return {"delay": milliseconds / 2000, "rate": megabits * 1e6 / 8}


class Link:
    """``links`` links in a process of their own; link ``k`` listens on ``127.0.0.(k+1)``, at the same ports.

    ``ports`` maps a port that the links listen on to the port of 127.0.0.1 that it leads to. At first nothing is delayed and
    the rate has no limit.
    """

    def __init__(self, ports: Mapping[int, int], *, links: int = 1) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        self._process = context.Process(target=_serve, args=(far, dict(ports), links), daemon=True)
        self._process.start()
        self._ask("ready")

    def shape(self, *, delay: float = 0.0, rate: float = math.inf) -> None:
        """From now on, ``delay``: seconds one way. ``rate``: bytes a second, each way of each link."""
        self._ask((delay, rate))

    def carried(self) -> list[tuple[int, int]]:
        """Bytes each link has taken in so far: (towards the port that it leads to, back)."""
        answer: list[tuple[int, int]] = self._ask("carried")
        return answer

    def close(self) -> None:
        """End the process, and with it every connection."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _ask(self, question: Any) -> Any:
        self._pipe.send(question)
        answer = self._pipe.recv()
        if isinstance(answer, OSError):
            raise answer
        return answer


# --- the process ----------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Pipe:
    """One direction of one connection. ``waiting`` has not passed the link yet; ``arrived`` has, and is not written yet."""

    source: socket.socket
    sink: socket.socket
    way: _Way
    waiting: deque[memoryview] = field(default_factory=deque)
    held: int = 0
    arrived: deque[memoryview] = field(default_factory=deque)
    ended: bool = False  # the source has sent its last byte


@dataclass(eq=False)
class _Way:
    """One direction of one link. ``free``: when it has carried all that was given to it. A chunk of None: the connection ends."""

    delay: float = 0.0
    rate: float = math.inf
    free: float = 0.0
    carried: int = 0
    turns: deque[_Pipe] = field(default_factory=deque)
    flight: deque[tuple[float, _Pipe, memoryview | None]] = field(default_factory=deque)

    def carry(self, now: float) -> None:
        """Give the link's time away, in turns, to what waits."""
        turn = _LARGEST_TURN if math.isinf(self.rate) else min(_LARGEST_TURN, max(_SMALLEST_TURN, int(self.rate * _TURN)))
        while self.turns and self.free <= now + _AHEAD:
            pipe = self.turns.popleft()
            begin = max(self.free, now)
            if pipe.waiting:
                chunk = pipe.waiting.popleft()
                if len(chunk) > turn:
                    pipe.waiting.appendleft(chunk[turn:])
                    chunk = chunk[:turn]
                pipe.held -= len(chunk)
                self.free = begin + len(chunk) / self.rate
                self.flight.append((self.free + self.delay, pipe, chunk))
            if pipe.waiting:
                self.turns.append(pipe)
            elif pipe.ended:
                self.flight.append((max(self.free, now) + self.delay, pipe, None))

    def due(self, now: float) -> float:
        """When this direction next needs the process, on its clock."""
        lands = self.flight[0][0] if self.flight else math.inf
        return min(lands, self.free - _AHEAD / 2) if self.turns else lands


class _Relay:
    """All links, on one thread. ``select`` rather than ``epoll``: its timeout is exact to some 0.1 ms, not to one."""

    def __init__(self, ports: Mapping[int, int], links: int) -> None:
        self._ports = ports
        self._ways = [(_Way(), _Way()) for _ in range(links)]
        self._listeners: dict[socket.socket, tuple[int, int]] = {}
        self._pipes: dict[socket.socket, _Pipe] = {}  # by source
        self._unwritten: dict[socket.socket, _Pipe] = {}  # by sink
        for link in range(links):
            for port, target in ports.items():
                self._listeners[socket.create_server((host_of(link), port))] = link, target

    def run(self, pipe: Connection) -> None:
        """Until None is asked."""
        while True:
            now = time.monotonic()
            due = min(way.due(now) for pair in self._ways for way in pair)
            reading = [source for source, each in self._pipes.items() if not each.ended and each.held < _BUFFER]
            timeout = None if math.isinf(due) else max(0.0, due - now)
            sources: list[Any] = [pipe, *self._listeners, *reading]
            ready, writable, _ = select.select(sources, list(self._unwritten), [], timeout)
            now = time.monotonic()
            for each in ready:
                if each is pipe:
                    question = pipe.recv()
                    if question is None:
                        return
                    pipe.send(self._answer(question))
                elif each in self._listeners:
                    self._accept(each)
                elif each in self._pipes:
                    self._read(self._pipes[each])
            for pair in self._ways:
                for way in pair:
                    way.carry(now)
                    self._land(way, now)
            for sink in writable:
                if sink in self._unwritten:
                    self._write(self._unwritten[sink])

    def _answer(self, question: Any) -> Any:
        if question == "carried":
            return [(up.carried, down.carried) for up, down in self._ways]
        if question != "ready":
            for pair in self._ways:
                for way in pair:
                    way.delay, way.rate = question
        return None

    def _accept(self, listener: socket.socket) -> None:
        link, target = self._listeners[listener]
        near, _ = listener.accept()
        try:
            far = socket.create_connection(("127.0.0.1", target), timeout=5)
        except OSError:
            near.close()
            return
        up, down = self._ways[link]
        for one in (near, far):
            one.setblocking(False)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._pipes[near] = _Pipe(near, far, up)
        self._pipes[far] = _Pipe(far, near, down)

    def _read(self, pipe: _Pipe) -> None:
        try:
            chunk = pipe.source.recv(_READ)
        except BlockingIOError:
            return
        except OSError:
            self._cut(pipe)
            return
        if not pipe.waiting:
            pipe.way.turns.append(pipe)
        if chunk:
            pipe.waiting.append(memoryview(chunk))
            pipe.held += len(chunk)
            pipe.way.carried += len(chunk)
        else:
            pipe.ended = True

    def _land(self, way: _Way, now: float) -> None:
        while way.flight and way.flight[0][0] <= now:
            _, pipe, chunk = way.flight.popleft()
            if pipe.source not in self._pipes:
                continue  # cut meanwhile
            if chunk is None:
                # Either side's end ends both: ZeroMQ never half-closes a connection.
                self._cut(pipe)
                continue
            pipe.arrived.append(chunk)
            if pipe.sink not in self._unwritten:
                self._write(pipe)

    def _write(self, pipe: _Pipe) -> None:
        try:
            while pipe.arrived:
                sent = pipe.sink.send(pipe.arrived[0])
                if sent < len(pipe.arrived[0]):
                    pipe.arrived[0] = pipe.arrived[0][sent:]
                else:
                    pipe.arrived.popleft()
        except BlockingIOError:
            self._unwritten[pipe.sink] = pipe
        except OSError:
            self._cut(pipe)
        else:
            self._unwritten.pop(pipe.sink, None)

    def _cut(self, pipe: _Pipe) -> None:
        for one in (pipe.source, pipe.sink):
            each = self._pipes.pop(one, None)
            if each is not None and each in each.way.turns:
                each.way.turns.remove(each)
            self._unwritten.pop(one, None)
            one.close()


def _serve(pipe: Connection, ports: dict[int, int], links: int) -> None:
    try:
        relay = _Relay(ports, links)
    except OSError as error:
        pipe.recv()
        pipe.send(error)
        return
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        relay.run(pipe)
