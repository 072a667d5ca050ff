"""The server's channel: every session, on one I/O thread that owns the endpoints, judges who may join and does all
sealing.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable

from splitfl.channel.admission import Admission
from splitfl.channel.handler import ServerHandler, SessionInfo
from splitfl.channel.link import Link
from splitfl.channel.timing import Timing
from splitfl.errors import ConfigError, LocalProtocolError, Refused, RemoteProtocolError, SealError
from splitfl.protocol.assembly import Inbox, Outbox, payload_view
from splitfl.protocol.ciphers import AeadFactory, Buffer, choose_cipher, make_aead, pick_ciphers
from splitfl.protocol.credit import CreditAccount
from splitfl.protocol.keys import AuthorizedClients
from splitfl.protocol.messages import (
    PROTOCOL_VERSION,
    Attach,
    Attached,
    Bye,
    Closing,
    ControlMessage,
    Credit,
    DataMessage,
    Fault,
    Heartbeat,
    Hello,
    Message,
    Open,
    OtherVersionError,
    RefusalCode,
    decode_control,
    encode,
)
from splitfl.protocol.messages import Refused as RefusedMessage
from splitfl.protocol.records import (
    DEFAULT_RECORD_BYTES,
    MAX_RECORD_BYTES,
    MIN_RECORD_BYTES,
    OVERHEAD_BYTES,
    Opener,
    Sealer,
)
from splitfl.transport.base import Endpoint, Sent, ServerFrame, ServerTransport

_log = logging.getLogger(__name__)

TICKET_SECONDS = 15
# Sessions that one key may have under way to being open.
_HANDSHAKES_A_KEY = 16
# A client may take this long between Welcome and Open (it reads its model meanwhile), seconds.
_OPENING_SECONDS = 900.0
_RECORDS_A_TURN = 4
# A peer whose pipe is full cannot be polled for: look again after this long, seconds. Its pipe holds several times what
# can leave in that time.
_FULL_RETRY = 0.001
_TICK = 0.25

_REMOVED = "your key was removed from the server's list"


class ServerChannel:
    """All sessions of one server. ``send``, ``tell``, ``credit`` and ``end`` may be called from any thread.

    Sizes in bytes: ``window`` is each client's credit, ``max_message`` the largest payload (at most the window),
    ``record`` the plaintext of a full record (256 KiB to 4 MiB). ``aead_factory`` is for benchmarks and tests.
    """

    def __init__(
        self,
        transport: ServerTransport,
        handler: ServerHandler,
        *,
        authorized: AuthorizedClients,
        window: int = 256 * 2**20,
        max_message: int = 64 * 2**20,
        record: int = DEFAULT_RECORD_BYTES,
        timing: Timing | None = None,
        ticket_seconds: int = TICKET_SECONDS,
        ciphers: tuple[str, ...] | None = None,
        aead_factory: AeadFactory = make_aead,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_message > window:
            raise ConfigError(
                f"the credit window ({window} bytes) must cover the largest message ({max_message} bytes)"
            )
        if not MIN_RECORD_BYTES <= record <= MAX_RECORD_BYTES:
            raise ConfigError(f"a record has {MIN_RECORD_BYTES} to {MAX_RECORD_BYTES} bytes, not {record}")
        self._transport, self._handler = transport, handler
        self._window, self._max_message, self._record = window, max_message, record
        self._timing, self._clock = timing or Timing(), clock
        self._admission = Admission(authorized, ticket_seconds, clock)
        self._ciphers, self._aead = ciphers or pick_ciphers(), aead_factory
        # Guards each link's session and credit, and the tables of links.
        self._lock = threading.RLock()
        self._links: dict[bytes, Link] = {}  # by control peer
        self._sessions: dict[str, Link] = {}  # by session id, from Opened on
        self._commands: deque[Callable[[], None]] = deque()
        self._stopping: str | None = None
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="splitfl-server", daemon=True)

    # --- any thread -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Binds the endpoints, proves that strangers are refused, and starts to serve. Raises ConfigError."""
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise self._failure

    def stop(self, text: str = "the server stops") -> None:
        """Sends what is queued (bounded wait), tells every client Closing, and joins the thread."""
        self._stopping = text
        self._transport.wake()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def send(self, session: str, message: DataMessage, payload: Buffer) -> None:
        """Queues a data message; ``payload`` must not change until it is sealed. A session that is gone is passed over.

        Raises LocalProtocolError when the buffer is not what the message declares.
        """
        view = payload_view(message, payload)
        self._do(lambda: self._add(session, message, view))

    def tell(self, session: str, message: ControlMessage) -> None:
        """Queues a control message. A session that is gone is passed over, and so is a StepOpened that a Pause has
        overtaken.

        Raises LocalProtocolError when the session's state forbids the message.
        """
        with self._lock:
            link = self._sessions.get(session)
            frame = link.session.send(message) if link is not None and link.session.is_open else None
            if link is None or frame is None:
                return
            self._do(lambda: self._deliver(link, frame))

    def credit(self, session: str, n: int) -> None:
        """Gives ``n`` bytes of credit back to that client; held back while its replies pile up unsent.

        Raises LocalProtocolError when that is more than the client has spent.
        """
        with self._lock:
            link = self._sessions.get(session)
            if link is None or link.account is None:
                return
            if n < 0 or link.credit_due + n > link.account.window - link.account.left:
                raise LocalProtocolError(f"{n} bytes of credit given back, more than that client has spent")
            link.credit_due += n
        self._transport.wake()

    def end(self, session: str, fault: Fault) -> None:
        """Tells the client the fault (made fatal), then closes its session."""
        self._do(lambda: self._end_by_id(session, fault))

    def _do(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._transport.wake()

    # --- the I/O thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._transport.on_refused(self._refusal)
        try:
            self._transport.bind(self._admission, self._record + OVERHEAD_BYTES)
        except BaseException as error:
            self._failure = error
            self._transport.close(0)
            self._started.set()
            return
        self._started.set()
        next_tick = self._clock()
        wait = 0.0
        try:
            while self._stopping is None:
                for frame in self._transport.poll(wait):
                    self._take(frame)
                wait = self._work()
                if self._clock() >= next_tick:
                    self._tick()
                    next_tick = self._clock() + _TICK
        except Exception:
            _log.exception("the server's I/O thread failed")
            self._stopping = "the server failed"
        finally:
            self._close_all(self._stopping or "the server stops")
            self._transport.close(self._timing.linger)

    def _work(self) -> float:
        """Commands, credits, records; how long the next poll may wait."""
        while self._commands:
            self._commands.popleft()()
        wait = _TICK
        for link in list(self._sessions.values()):
            wait = min(wait, self._serve(link))
        return wait

    def _serve(self, link: Link) -> float:
        if link.outbox is None or link.data_peer is None:
            return _TICK
        if link.credit_due and link.outbox.pending <= self._window:
            self._give_credit(link)
        for _ in range(_RECORDS_A_TURN):
            frame = link.stuck or link.outbox.next_frame()
            link.stuck = None
            if frame is None:
                return _TICK
            sent = self._transport.send_data(link.data_peer, frame)
            if sent is Sent.FULL:
                link.stuck = frame
                return _FULL_RETRY
            if sent is Sent.GONE:
                self._drop(link, "its data connection broke")
                return _TICK
        return 0.0

    def _give_credit(self, link: Link) -> None:
        with self._lock:
            assert link.account is not None
            due, link.credit_due = link.credit_due, 0
            link.account.give(due)
            frame = link.session.send(Credit(due))
        if frame is not None:
            self._deliver(link, frame)

    def _add(self, session: str, message: DataMessage, payload: memoryview) -> None:
        link = self._sessions.get(session)
        if link is not None and link.outbox is not None:
            link.outbox.add(message, payload)

    def _deliver(self, link: Link, frame: bytes) -> None:
        if link.control_peer not in self._links:
            return
        sent = self._transport.send_control(link.control_peer, frame)
        if sent is not Sent.SENT:
            self._drop(
                link, "its control connection broke" if sent is Sent.GONE else "it does not read its control messages"
            )

    def _tell(self, link: Link, message: Message) -> None:
        with self._lock:
            frame = link.session.send(message)
        if frame is not None:
            self._deliver(link, frame)

    # --- what comes in ----------------------------------------------------------------------------------------------

    def _take(self, frame: ServerFrame) -> None:
        if frame.endpoint is Endpoint.CONTROL:
            link = self._links.get(frame.peer) or self._greet(frame)
        else:
            link = self._sessions.get(frame.user)
        if link is None:
            return  # of a session that has ended
        link.heard = self._clock()
        try:
            if frame.endpoint is Endpoint.CONTROL:
                self._take_control(link, frame)
            else:
                self._take_data(link, frame)
        except Refused as error:
            self._refuse(link, error)
        except SealError as error:
            self._end(link, Fault(RefusalCode.SEAL, f"the session's seal is broken: {error}"))
        except RemoteProtocolError as error:
            self._end(link, Fault(RefusalCode.PROTOCOL, f"this client broke the protocol: {error}"))
        except Exception:
            _log.exception("session %s of %s failed", link.id or "(opening)", link.peer.name)
            self._end(link, Fault(RefusalCode.INTERNAL, "the server failed in this session: its log says where"))

    def _greet(self, frame: ServerFrame) -> Link | None:
        """A peer's first message, which must be a Hello. Its key was on the list when it connected; it must be still.

        Anything else from a peer without a session is what a session that has ended sent before it knew.
        """
        try:
            if not isinstance(decode_control(bytes(frame.frame), from_client=True), Hello):
                return None
        except OtherVersionError:
            pass  # answered with a Refused like any Hello that does not fit
        except RemoteProtocolError:
            return None
        found = self._admission.peer(frame.user, frame.address)
        if found is None:
            return None
        peer, listed = found
        link = Link(frame.peer, peer, self._clock(), deadline=self._clock() + _OPENING_SECONDS)
        underway = sum(
            other.peer.public_key == peer.public_key and not other.attached for other in self._links.values()
        )
        if not listed or underway >= _HANDSHAKES_A_KEY:
            code = RefusalCode.FULL if listed else RefusalCode.NOT_AUTHORIZED
            text = "too many sessions of your key are opening" if listed else _REMOVED
            self._transport.send_control(frame.peer, encode(RefusedMessage(code, text)))
            self._refusal(peer.who, code, text)
            return None
        with self._lock:
            self._links[frame.peer] = link
        return link

    def _take_control(self, link: Link, frame: ServerFrame) -> None:
        if frame.user != str(link.peer.public_key):
            raise RemoteProtocolError("the peer behind this session changed")
        try:
            with self._lock:
                message = link.session.receive(bytes(frame.frame))
        except OtherVersionError as error:
            raise Refused(
                RefusalCode.PROTOCOL_VERSION,
                f"this client speaks protocol version {error.theirs}, the server {PROTOCOL_VERSION}: "
                "install the same splitfl version on both sides",
            ) from None
        if message is None or isinstance(message, Heartbeat):
            return
        if isinstance(message, Hello):
            link.hello = message
            self._tell(link, self._handler.welcome(link.peer, message))
        elif isinstance(message, Open):
            self._open(link, message)
        elif isinstance(message, Bye):
            self._drop(link, "the client said goodbye")
        elif link.attached:
            self._handler.on_control(link.id, message)
        else:
            raise RemoteProtocolError(f"{type(message).__name__} before the data connection was attached")

    def _open(self, link: Link, message: Open) -> None:
        cipher = choose_cipher(message.ciphers, self._ciphers)
        if cipher is None:
            raise Refused(
                RefusalCode.CIPHER, f"the server has none of the client's ciphers; it has {', '.join(self._ciphers)}"
            )
        self._handler.admit(link.peer, message)
        link.open = message
        session = secrets.token_hex(8)
        with self._lock:
            _, frame = link.session.send_opened(
                session=session,
                ticket=self._admission.ticket(session),
                ticket_seconds=self._admission.ticket_seconds,
                data_address=self._transport.data_address,
                cipher=cipher,
                window=self._window,
                max_message=self._max_message,
                record=self._record,
            )
            keys = link.session.secrets
            assert keys is not None
            link.id, link.account = session, CreditAccount(self._window)
            link.outbox = Outbox(Sealer(keys.server, cipher, aead_factory=self._aead), self._record)
            link.inbox = self._inbox(link, Opener(keys.client, cipher, aead_factory=self._aead))
            self._sessions[session] = link
            link.deadline = self._clock() + self._admission.ticket_seconds + self._timing.silence
        self._deliver(link, frame)

    def _inbox(self, link: Link, opener: Opener) -> Inbox:
        return Inbox(
            opener,
            from_client=True,
            record_bytes=self._record,
            max_message=self._max_message,
            allocate=lambda message: self._handler.allocate(link.id, message),
            admit=lambda message: self._admit(link, message),
            charge=lambda size: self._charge(link, size),
        )

    def _admit(self, link: Link, message: DataMessage) -> None:
        if isinstance(message, Attach) is link.attached:
            raise RemoteProtocolError("Attach comes first on a data connection, and once")
        with self._lock:
            link.session.check_receive(message)

    def _charge(self, link: Link, size: int) -> None:
        with self._lock:
            assert link.account is not None
            link.account.charge(size)

    def _take_data(self, link: Link, frame: ServerFrame) -> None:
        if link.data_peer is None:
            link.data_peer = frame.peer
        elif link.data_peer != frame.peer:
            raise RemoteProtocolError("a second data connection in one session")
        assert link.inbox is not None
        done = link.inbox.receive(frame.frame)
        if done is None:
            return
        message, target = done
        if not isinstance(message, Attach):
            self._handler.on_data(link.id, message, target)
            return
        assert link.outbox is not None
        assert link.hello is not None
        assert link.open is not None
        link.attached = True
        # Told before Attached leaves: the client's first message finds a handler that knows the session.
        self._handler.on_opened(SessionInfo(link.id, link.peer, link.open, link.hello))
        link.outbox.add(Attached(), b"")

    # --- endings ----------------------------------------------------------------------------------------------------

    def _refuse(self, link: Link, error: Refused) -> None:
        if link.attached:
            self._end(link, Fault(error.code, str(error)))
            return
        self._deliver(link, encode(RefusedMessage(error.code, str(error))))
        self._forget(link)
        self._refusal(link.peer.who, error.code, str(error))

    def _refusal(self, who: str, code: str, text: str) -> None:
        try:
            self._handler.on_refused(who, code, text)
        except Exception:
            _log.exception("on_refused failed")

    def _end_by_id(self, session: str, fault: Fault) -> None:
        link = self._sessions.get(session)
        if link is not None:
            self._end(link, fault)

    def _end(self, link: Link, fault: Fault) -> None:
        """Tells the client why, then drops it. What it has sent meanwhile is passed over."""
        text = fault.text.encode()[:4000].decode(errors="ignore")
        self._transport.send_control(link.control_peer, encode(Fault(fault.code, text, True, fault.micro)))
        self._drop(link, f"{fault.code}: {fault.text}")

    def _drop(self, link: Link, reason: str) -> None:
        if not self._forget(link):
            return
        if not link.attached:
            self._refusal(link.peer.who, "lost", f"gone before its session was open: {reason}")
            return
        try:
            self._handler.on_closed(link.id, reason)
        except Exception:
            _log.exception("on_closed failed")

    def _forget(self, link: Link) -> bool:
        with self._lock:
            known = self._links.pop(link.control_peer, None) is not None
            self._sessions.pop(link.id, None)
        return known

    def _close_all(self, text: str) -> None:
        deadline = self._clock() + self._timing.flush
        try:
            while any(link.outbox or link.stuck for link in self._sessions.values() if link.attached):
                if self._clock() >= deadline:
                    break
                self._transport.poll(_FULL_RETRY)
                self._work()
            for link in list(self._links.values()):
                self._transport.send_control(link.control_peer, encode(Closing(text)))
                self._drop(link, text)
        except Exception:
            _log.exception("closing failed")

    def _tick(self) -> None:
        now = self._clock()
        self._admission.expire()
        edited = self._admission.changed()
        for link in list(self._links.values()):
            if edited and not self._admission.lists(link.peer):
                self._end(link, Fault(RefusalCode.NOT_AUTHORIZED, _REMOVED))
            elif now - link.heard >= self._timing.silence:
                self._drop(link, f"silent for {self._timing.silence:g} s")
            elif not link.attached and now >= link.deadline:
                self._end(link, Fault(RefusalCode.STALE, "the session was not opened in time"))
            elif link.hello is not None and now - link.beat >= self._timing.heartbeat:
                link.beat = now
                self._tell(link, Heartbeat(time.time()))
