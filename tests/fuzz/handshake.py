"""A whole session as one side sees it: the handshake, then what may come, in any order. The other side says what it likes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from splitfl.channel.admission import Admission
from splitfl.channel.datapath import DataPath, data_address
from splitfl.channel.handler import Peer, SessionInfo
from splitfl.channel.link import Link
from splitfl.channel.offer import Offer
from splitfl.channel.sessions import Sessions
from splitfl.channel.timing import Timing
from splitfl.errors import LocalProtocolError, Refused, RemoteProtocolError
from splitfl.protocol import messages as m
from splitfl.protocol.ciphers import AES_256_GCM
from splitfl.protocol.keys import AuthorizedClient, AuthorizedClients, Identity
from splitfl.protocol.records import FIRST, LAST, METADATA
from splitfl.protocol.schedule import KemKey
from splitfl.protocol.session import ClientSession, State
from splitfl.transport.base import Endpoint, Sent, ServerFrame
from tests.fuzz.nullcipher import null_aead, record
from tests.fuzz.pieces import split
from tests.fuzz.sentences import check_sentence

__all__ = ["client", "server"]

RECORD, WINDOW, LARGEST = 4096, 16384, 8192

_IDENTITY = Identity.from_secret(bytes(range(32)))
_HELLO = m.Hello(m.PROTOCOL_VERSION, "run", {"torch": "2"}, "here")
_OPEN = m.Open(bytes(32), KemKey().public, (AES_256_GCM,), {"config": "0"}, (1, 1), "a")
_WELCOME = m.Welcome(m.PROTOCOL_VERSION, "run", {"cut": "1:1"}, {}, 0.0)
_OPENED = m.Opened("s", bytes(32), 15, "tcp://*:7001", bytes(32), bytes(1088), AES_256_GCM, WINDOW, LARGEST, RECORD, 3)
#: The metadata of Attach and of Attached as :func:`record` takes it.
_ATTACH, _ATTACHED = (bytes([METADATA, FIRST | LAST, 0]) + bytes(4) + m.encode(message) for message in (m.Attach(), m.Attached()))


class _Wire:
    """The server's transport: what it sends is held against the protocol."""

    data_address = "tcp://*:7001"

    def send_control(self, peer: bytes, frame: bytes) -> Sent:
        m.decode_control(frame, from_client=False)
        return Sent.GONE if peer == b"gone" else Sent.SENT

    def make_frame(self, size: int) -> bytearray:
        return bytearray(size)

    def send_data(self, peer: bytes, frame: Any) -> Sent:
        return Sent.SENT

    def hang_up(self, endpoint: Endpoint, peer: bytes) -> None:
        pass

    def connected(self, user: str) -> int:
        return 1


class _Desk:
    """The server's handler."""

    def __init__(self) -> None:
        self.present: set[str] = set()
        self.held = 0  # bytes whose credit is not given back

    def welcome(self, peer: Peer, hello: m.Hello) -> m.Welcome:
        if hello.run != "run":
            raise Refused("unknown-run", f"there is no run {hello.run!r} here")
        return _WELCOME

    def admit(self, peer: Peer, open: m.Open) -> int:
        if open.name == "refused":
            raise Refused("full", "no")
        return 0

    def elsewhere(self, peer: Peer) -> m.Redirect | None:
        return None

    def on_opened(self, session: SessionInfo) -> None:
        assert session.session not in self.present
        self.present.add(session.session)

    def allocate(self, session: str, message: Any) -> tuple[Any, memoryview]:
        assert session in self.present
        assert message.payload_bytes <= LARGEST
        self.held += message.payload_bytes
        assert self.held <= WINDOW, "memory beyond the credit"
        buffer = bytearray(message.payload_bytes)
        return buffer, memoryview(buffer)

    def on_data(self, session: str, message: Any, payload: Any) -> None:
        assert session in self.present
        assert (0 if payload is None else len(payload)) == message.payload_bytes

    def on_control(self, session: str, message: Any) -> None:
        assert session in self.present
        assert isinstance(message, m.Enrol | m.StepDone | m.AskNorm | m.Pause | m.Leave | m.Ends)

    def on_refused(self, who: str, code: str, text: str) -> None:
        assert text.isprintable() or "\n" in text or "\t" in text

    def on_closed(self, session: str, reason: str, *, lost: bool) -> None:
        self.present.remove(session)


class _Strict(Sessions):
    """Does not forgive what a server in service logs and survives."""

    def end(self, link: Link, code: str, text: str, micro: int | None = None) -> None:
        if code == m.RefusalCode.INTERNAL:
            raise
        super().end(link, code, text, micro)


class _Server:
    """All sessions of one client of a server."""

    def __init__(self) -> None:
        self.now = 0.0
        self.desk = _Desk()
        listed = AuthorizedClients.of({_IDENTITY.public: AuthorizedClient("a")})
        offer = Offer(WINDOW, LARGEST, RECORD, (AES_256_GCM,), null_aead)
        admission = Admission(listed, 15, lambda: self.now)
        wire: Any = _Wire()
        self.sessions = _Strict(wire, self.desk, admission, offer, Timing(), lambda: self.now)
        self.user = str(_IDENTITY.public)
        self.peer = b"peer"

    @property
    def link(self) -> Link | None:
        return self.sessions._links.get(self.peer)

    def is_over(self, peer: bytes) -> bool:
        """Whether this control connection had its session, or its no."""
        leaving = self.sessions._leaving
        return (Endpoint.CONTROL, peer) in leaving or leaving.is_gone(Endpoint.CONTROL, peer)

    def control(self, frame: bytes, user: str | None = None, peer: bytes | None = None) -> None:
        if self.is_over(self.peer):
            self.peer += b"'"  # a connection serves one session
        self.sessions.take(ServerFrame(Endpoint.CONTROL, peer or self.peer, user or self.user, "here", frame))

    def data(self, frame: bytes, peer: bytes = b"data") -> None:
        if self.link is not None and self.link.id:
            self.sessions.take(ServerFrame(Endpoint.DATA, peer, self.link.id, "here", frame))

    def sealed(self, said: bytes) -> None:
        link = self.link
        if link is not None and link.inbox is not None:
            self.data(record(link.inbox.records, said, RECORD))

    def open(self) -> None:
        self.control(m.encode(_HELLO))
        self.control(m.encode(_OPEN))
        self.sealed(_ATTACH)

    def tell(self, said: bytes) -> None:
        """The server's own word, by its first byte; what its state forbids is not said."""
        link = self.link
        if link is None or not link.session.is_open:
            return
        step = said[1] if len(said) > 1 else 0
        choice: tuple[m.Message, ...] = (
            m.StepOpened(step),
            m.StepClosed(step, 0, 1, 0.0, None),
            m.StepClosed(step, 0, 1, 0.0, None, dropped=True),
            m.RoundOpened(step),
        )
        try:
            frame = link.session.send(choice[said[0] % len(choice) if said else 0])
        except LocalProtocolError:
            return
        if frame is not None:
            self.sessions.deliver(link, frame)

    def pass_time(self, said: bytes) -> None:
        self.now += 8.0 * (said[0] if said else 1)
        self.sessions.tick()

    def credit(self, said: bytes) -> None:
        link = self.link
        # As the channel does it: not to a client that has said goodbye.
        if link is not None and link.account is not None and link.goodbye is None:
            due = min(int.from_bytes(said[:2], "big"), link.account.window - link.account.left - link.credit_due)
            link.credit_due += due
            self.desk.held -= due
            self.sessions.give_credit(link)


def server(data: bytes) -> None:
    """What one client sends to a server, on both endpoints."""
    one = _Server()
    acts: tuple[Callable[[bytes], None], ...] = (
        one.control,
        one.data,
        one.sealed,
        lambda said: one.open(),
        one.tell,
        one.pass_time,
        one.credit,
        lambda said: one.control(said, "somebody else"),
        lambda said: one.data(said, b"another"),
        lambda said: one.control(said[1:], peer=b"of the same key" + said[:1]),
        lambda said: one.control(said, "no key", b"odd"),
    )
    for piece in split(data):
        if piece:
            before = one.link
            acts[piece[0] % len(acts)](piece[1:])
            if before is not None and one.link is not before:
                one.desk.held = 0  # that session is over, and its memory free
        link = one.link
        if link is not None and link.account is not None:
            assert 0 <= link.account.left <= WINDOW
        assert not any(one.is_over(peer) for peer in one.sessions._links)
        assert len(one.desk.present) <= 1


class _Client:
    """One client's session and its data connection, without the sockets."""

    def __init__(self) -> None:
        self.session = ClientSession()
        self.path: DataPath | None = None
        self.attached = False
        self.session.send(_HELLO)
        self.opening = False

    def control(self, frame: bytes) -> None:
        message = self.session.receive(frame)
        if isinstance(message, m.Opened):
            host, port = data_address(message.data_address, "dialled")
            assert host
            assert 0 < port < 65536
            secrets = self.session.secrets
            assert secrets is not None
            self.path = DataPath(message, secrets, aead_factory=null_aead, allocate=self._allocate, admit=self._admit)
        elif isinstance(message, m.Credit) and self.path is not None:
            self.path.credit.receive(message.bytes)
            assert self.path.credit.left <= self.path.credit.window

    def data(self, frame: bytes) -> None:
        if self.path is not None:
            done = self.path.receive(frame)
            if done is not None:
                self.attached = self.attached or isinstance(done[0], m.Attached)
                assert len(done[1] or b"") == done[0].payload_bytes

    def sealed(self, said: bytes) -> None:
        if self.path is not None:
            self.data(record(self.path._inbox.records, said, RECORD))

    def welcomed(self) -> None:
        """As far as Open, where the server has let it."""
        if self.session.state is State.GREETED:
            self.control(m.encode(_WELCOME))
        if self.session.state is State.WELCOMED:
            self.session.send(self.session.make_open(ciphers=(AES_256_GCM,), model={}, cut=(1, 1), name="a"))

    def opened(self) -> None:
        self.welcomed()
        if self.session.state is State.OPENING:
            self.control(m.encode(_OPENED))
            self.sealed(_ATTACHED)

    def say(self, said: bytes) -> None:
        """The client's own word, by its first byte; what its state forbids is not said."""
        step = self.session.step if self.session.step is not None else 0
        choice: tuple[m.Message, ...] = (
            m.Enrol(),
            m.StepDone(step, 0, 0, "continue"),
            m.StepDone(step, 0, 0, "pause"),
            m.AskNorm(step, 1),
            m.Pause(),
            m.Leave(),
            m.Bye(),
        )
        try:
            self.session.send(choice[said[0] % len(choice) if said else 0])
        except LocalProtocolError:
            return

    def _allocate(self, message: Any) -> tuple[Any, memoryview]:
        if message.payload_bytes > LARGEST:
            raise RemoteProtocolError("more than was asked for")
        buffer = bytearray(message.payload_bytes)
        return buffer, memoryview(buffer)

    def _admit(self, message: Any) -> None:
        if not self.attached and not isinstance(message, m.Attached):
            raise RemoteProtocolError("data before Attached")


def client(data: bytes) -> None:
    """What one server sends to a client, on both endpoints."""
    one = _Client()
    acts: tuple[Callable[[bytes], None], ...] = (
        one.control,
        one.data,
        one.sealed,
        lambda said: one.welcomed(),
        lambda said: one.opened(),
        one.say,
    )
    for piece in split(data):
        if not piece:
            continue
        try:
            acts[piece[0] % len(acts)](piece[1:])
        except RemoteProtocolError as error:
            check_sentence(error)
            return
        assert one.session.state in State
        assert (one.session.secrets is not None) or not one.session.is_open
