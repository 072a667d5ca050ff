"""A server and its clients in one process, over either transport, with handlers that record what happens."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from splitfl.channel.client import ClientChannel
from splitfl.channel.handler import Peer, SessionInfo
from splitfl.channel.opening import OpenTerms
from splitfl.channel.server import ServerChannel
from splitfl.channel.timing import Timing
from splitfl.errors import Refused, SplitflError
from splitfl.protocol.join import JoinString
from splitfl.protocol.keys import AuthorizedClient, AuthorizedClients, Identity, PublicKey
from splitfl.protocol.messages import (
    PROTOCOL_VERSION,
    Backward,
    Forward,
    Grad,
    Hello,
    Hidden,
    Open,
    Redirect,
    Welcome,
)
from splitfl.transport.memory import MemoryClientTransport, MemoryNetwork, MemoryServerTransport
from splitfl.transport.zmq_client import ZmqClientTransport
from splitfl.transport.zmq_server import ZmqServerTransport

MIB = 2**20
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's account of a connection is Linux's")
MODEL = {"config": "abc", "shards": ["0" * 64]}
QUICK = Timing(heartbeat=0.1, silence=1.0, flush=5.0, linger=0.5)


def wait_until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    """Fails when the condition does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


class Handler:
    """Echoes every forward and backward with its bytes inverted; records the rest."""

    def __init__(self) -> None:
        self.channel: ServerChannel | None = None
        self.opened: list[SessionInfo] = []
        self.data: list[tuple[str, Any, bytearray]] = []
        self.control: list[tuple[str, Any]] = []
        self.refused: list[tuple[str, str, str]] = []
        self.closed: list[tuple[str, str]] = []
        self.echo = True
        self.give_credit = True
        self.full = False
        self.redirect: Redirect | None = None

    def welcome(self, peer: Peer, hello: Hello) -> Welcome:
        if hello.run != "run":
            raise Refused("unknown-run", f"there is no run {hello.run!r} here")
        return Welcome(PROTOCOL_VERSION, "run", {"cut": [1, 1]}, {"torch": "2"}, time.time())

    def admit(self, peer: Peer, open: Open) -> int:
        if self.full:
            raise Refused("full", "the run is full")
        if open.model != MODEL:
            raise Refused("model-mismatch", "the model differs")
        if open.cut != (1, 1):
            raise Refused("cut-mismatch", "the cut differs")
        return 7

    def elsewhere(self, peer: Peer) -> Redirect | None:
        return self.redirect

    def on_opened(self, session: SessionInfo) -> None:
        self.opened.append(session)

    def allocate(self, session: str, message: Any) -> tuple[Any, memoryview]:
        buffer = bytearray(message.payload_bytes)
        return buffer, memoryview(buffer)

    def on_data(self, session: str, message: Any, payload: Any) -> None:
        self.data.append((session, message, payload))
        if self.echo:
            self.answer(session, message, payload)

    def answer(self, session: str, message: Any, payload: Any) -> None:
        assert self.channel is not None
        reply = Hidden if isinstance(message, Forward) else Grad
        back = reply(message.step, message.micro, message.rows, message.hidden, message.dtype, message.codec)
        self.channel.send(session, back, inverted(payload))
        if self.give_credit:
            self.channel.credit(session, message.payload_bytes)

    def on_control(self, session: str, message: Any) -> None:
        self.control.append((session, message))

    def on_refused(self, who: str, code: str, text: str) -> None:
        self.refused.append((who, code, text))

    def on_closed(self, session: str, reason: str, *, lost: bool) -> None:
        self.closed.append((session, reason))


_INVERSE = bytes(255 - value for value in range(256))


def inverted(payload: Any) -> bytes:
    """What the handler answers, so that an answer is never mistaken for the question."""
    return bytes(payload).translate(_INVERSE)


class Client:
    """A channel with what it received."""

    def __init__(self) -> None:
        self.channel: ClientChannel = None  # type: ignore[assignment]
        self.data: list[tuple[Any, bytearray]] = []
        self.control: list[Any] = []
        self.lost: list[SplitflError] = []
        self.threads: set[str] = set()

    def allocate(self, message: Any) -> tuple[Any, memoryview]:
        buffer = bytearray(message.payload_bytes)
        return buffer, memoryview(buffer)

    def on_data(self, message: Any, payload: Any) -> None:
        self.threads.add(threading.current_thread().name)
        self.data.append((message, payload))

    def echo(self, payload: bytes, micro: int = 0, step: int = -1) -> bytes:
        """Sends one forward of the payload and waits for its answer."""
        self.channel.send(forward(len(payload), micro, step), payload)
        wait_until(lambda: any(message.micro == micro for message, _ in self.data) or self.lost)
        assert not self.lost, self.lost
        return next(bytes(received) for message, received in self.data if message.micro == micro)


def forward(size: int, micro: int = 0, step: int = -1, *, train: bool = False) -> Forward:
    """A forward whose payload has ``size`` bytes (even)."""
    assert size % 2 == 0
    return Forward(step, micro, ((size // 2, 0),), 1, "bfloat16", "raw", train, train, True)


def backward(size: int, micro: int, step: int) -> Backward:
    return Backward(step, micro, size // 2, 1, "bfloat16", "raw", 1, 1.0)


class World:
    """One server over the named transport; ``join`` opens clients. ``like``: another one whose keys this one has."""

    def __init__(self, kind: str, *, like: World | None = None, **server: Any) -> None:
        self.kind = kind
        self.server_identity = like.server_identity if like else Identity.generate()
        self.identity = like.identity if like else Identity.generate()
        self.handler = Handler()
        self.authorized = AuthorizedClients.of({self.identity.public: AuthorizedClient("alice", {"max_tokens": 7})})
        self.network = MemoryNetwork()
        self.transport: Any = (
            MemoryServerTransport(self.network, self.server_identity)
            if kind == "memory"
            else ZmqServerTransport(self.server_identity, host="127.0.0.1")
        )
        server.setdefault("window", 8 * MIB)
        server.setdefault("max_message", 8 * MIB)
        server.setdefault("timing", QUICK)
        self.server = ServerChannel(self.transport, self.handler, authorized=self.authorized, **server)
        self.handler.channel = self.server
        self.clients: list[Client] = []
        self.server.start()

    @property
    def join_string(self) -> JoinString:
        return JoinString(self.server_identity.public, "127.0.0.1", self.transport.control_port, "run")

    @property
    def ports(self) -> tuple[int, int]:
        """Of control, of data."""
        return self.transport.control_port, self.transport.data_port

    def client_transport(self) -> Any:
        return MemoryClientTransport(self.network) if self.kind == "memory" else ZmqClientTransport()

    def join(self, **changes: Any) -> Client:
        client = Client()
        terms = OpenTerms(changes.pop("model", MODEL), changes.pop("cut", (1, 1)))
        arguments: dict[str, Any] = {
            "name": "a",
            "libraries": {"torch": "2"},
            "answer": lambda welcome: terms,
            "allocate": client.allocate,
            "on_data": client.on_data,
            "on_control": client.control.append,
            "on_lost": client.lost.append,
            "transport": None,
            "timeout": 3.0,
            "timing": QUICK,
        }
        join = changes.pop("join", None) or self.join_string
        identity = changes.pop("identity", self.identity)
        arguments.update(changes)
        arguments["transport"] = arguments["transport"] or self.client_transport()
        client.channel = ClientChannel.open(join, identity, **arguments)
        self.clients.append(client)
        return client

    def allow(self, key: PublicKey, name: str) -> None:
        self.authorized._clients[key.raw] = AuthorizedClient(name)

    def listed(self, name: str, **limits: Any) -> Identity:
        """A further client on the list, with limits."""
        identity = Identity.generate()
        self.authorized._clients[identity.public.raw] = AuthorizedClient(name, limits)
        return identity

    def close(self) -> None:
        for client in self.clients:
            client.channel.close()
        self.server.stop()


Make = Callable[..., World]


def make_worlds(kind: str) -> Iterator[Make]:
    """For a fixture: makes worlds over one transport and closes them."""
    worlds: list[World] = []

    def build(**server: Any) -> World:
        worlds.append(World(kind, **server))
        return worlds[-1]

    yield build
    for world in worlds:
        world.close()


def closed_at_the_end() -> Iterator[Callable[[Any], Any]]:
    """For a fixture: gives back what it is given, and closes that, the latest first."""
    kept: list[Any] = []

    def keep(thing: Any) -> Any:
        kept.append(thing)
        return thing

    yield keep
    for thing in reversed(kept):
        thing.close()
