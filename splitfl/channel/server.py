"""The server's channel: every session, on one I/O thread that owns the endpoints and does all sealing."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from splitfl.channel.admission import Admission
from splitfl.channel.handler import ServerHandler
from splitfl.channel.link import Link
from splitfl.channel.offer import Offer
from splitfl.channel.sessions import Sessions, is_due
from splitfl.channel.timing import Timing
from splitfl.errors import ConfigError, LocalProtocolError
from splitfl.protocol.assembly import largest_frame, payload_view
from splitfl.protocol.ciphers import AeadFactory, Buffer, make_aead, pick_ciphers
from splitfl.protocol.control import CURVE, SEALED
from splitfl.protocol.keys import AuthorizedClients
from splitfl.protocol.messages import ControlMessage, DataMessage, Fault
from splitfl.protocol.records import DEFAULT_RECORD_BYTES, MAX_RECORD_BYTES, MIN_RECORD_BYTES
from splitfl.transport.base import Sent, ServerTransport

_log = logging.getLogger(__name__)

TICKET_SECONDS = 15
_FRAMES_A_TURN = 4
# A peer whose pipe is full cannot be polled for: look again after this long, seconds. Its pipe holds several times what
# can leave in that time.
_FULL_RETRY = 0.001
_TICK = 0.25


class ServerChannel:
    """All sessions of one server. ``send``, ``tell``, ``credit`` and ``end`` may be called from any thread.

    Sizes in bytes: ``window`` is each client's credit, ``max_message`` the largest payload (at most the window),
    ``record`` the plaintext of a full record (256 KiB to 4 MiB). ``bulk``: the data endpoint's gate, see
    :data:`splitfl.protocol.control.BULK`. ``aead_factory`` is for benchmarks and tests.
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
        bulk: str = SEALED,
        aead_factory: AeadFactory = make_aead,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_message > window:
            raise ConfigError(f"the credit window ({window} bytes) must cover the largest message ({max_message} bytes)")
        if not MIN_RECORD_BYTES <= record <= MAX_RECORD_BYTES:
            raise ConfigError(f"a record has {MIN_RECORD_BYTES} to {MAX_RECORD_BYTES} bytes, not {record}")
        self._transport, self._record, self._window, self._bulk = transport, record, window, bulk
        self._timing, self._clock = timing or Timing(), clock
        self._admission = Admission(authorized, ticket_seconds, clock, bulk)
        offer = Offer(window, max_message, record, ciphers or pick_ciphers(), aead_factory, bulk)
        self._sessions = Sessions(transport, handler, self._admission, offer, self._timing, clock)
        self._commands: deque[tuple[Link, Callable[[], None]]] = deque()
        self._stopping: str | None = None
        self._back = False
        self._wait = 0.0
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

    @property
    def failure(self) -> BaseException | None:
        """Why the I/O thread has ended without having been told to; None while it serves."""
        return self._failure

    def stop(self, text: str = "the server stops", *, back: bool = False) -> None:
        """Sends what is queued (bounded wait), tells every client Closing, and joins the thread. ``back``: the server means to be
        back, so that clients wait for it.
        """
        self._back, self._stopping = back, text
        self._transport.wake()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def send(self, session: str, message: DataMessage, payload: Buffer) -> None:
        """Queues a data message; ``payload`` must not change until it is sealed. A session that is gone is passed over.

        Raises LocalProtocolError when the buffer is not what the message declares.
        """
        view = payload_view(message, payload)
        link = self._sessions.find(session)
        if link is not None and link.outbox is not None:
            self._do(link, functools.partial(link.outbox.add, message, view))

    def tell(self, session: str, message: ControlMessage) -> None:
        """Queues a control message. A session that is gone is passed over, and so is a StepOpened that a Pause has
        overtaken.

        Raises LocalProtocolError when the session's state forbids the message.
        """
        with self._sessions.lock:
            link = self._sessions.find(session)
            frame = link.session.send(message) if link is not None and link.session.is_open else None
            if link is not None and frame is not None:
                self._do(link, functools.partial(self._sessions.deliver, link, frame))

    def credit(self, session: str, n: int) -> None:
        """Gives ``n`` bytes of credit back to that client; held back while its replies pile up unsent.

        Raises LocalProtocolError when that is more than the client has spent.
        """
        with self._sessions.lock:
            link = self._sessions.find(session)
            if link is None or link.account is None:
                return
            if n < 0 or link.credit_due + n > link.account.window - link.account.left:
                raise LocalProtocolError(f"{n} bytes of credit given back, more than that client has spent")
            link.credit_due += n
            due = is_due(link)
        if due:
            self._do(link, lambda: None)

    def end(self, session: str, fault: Fault) -> None:
        """Tells the client the fault (made fatal), then closes its session."""
        link = self._sessions.find(session)
        if link is not None:
            self._do(link, functools.partial(self._sessions.end, link, fault.code, fault.text, fault.micro))

    def traffic(self) -> dict[str, tuple[int, int]]:
        """Bytes of frames (received, sent) by client's name, over all its sessions."""
        return self._sessions.traffic()

    def _do(self, link: Link, command: Callable[[], None]) -> None:
        self._commands.append((link, command))
        if threading.current_thread() is not self._thread:
            self._transport.wake()

    # --- the I/O thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._transport.on_refused(self._sessions.refusal)
        self._transport.on_cut(self._sessions.cut)
        try:
            self._transport.bind(self._admission, largest_frame(self._record), window=self._window, curve=self._bulk == CURVE)
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
                for frame in self._transport.poll(0.0 if self._commands else wait):
                    self._sessions.take(frame)
                wait = self._work()
                if self._clock() >= next_tick:
                    self._sessions.tick()
                    next_tick = self._clock() + _TICK
            self._flush()
        except Exception as error:
            _log.exception("the server's I/O thread failed")
            self._failure = error
            # Whoever runs the server starts it again; clients wait for that, as they do for one that was killed.
            self._stopping, self._back = self._stopping or "the server has failed", True
        finally:
            try:
                self._sessions.close_all(self._stopping or "the server stops", back=self._back)
            finally:
                self._transport.close(self._timing.linger)

    def _work(self) -> float:
        """Commands, credits, records; how long the next poll may wait."""
        while self._commands:
            link, command = self._commands.popleft()
            self._sessions.guard(link, command)
            self._sessions.activate(link)
        self._wait = _TICK
        for link in self._sessions.ready_links():
            self._sessions.guard(link, self._serve, link)
        return self._wait

    def _serve(self, link: Link) -> None:
        assert link.outbox is not None
        assert link.data_peer is not None
        self._sessions.give_credit(link)
        for _ in range(_FRAMES_A_TURN):
            frame = link.stuck or link.outbox.next_frame()
            link.stuck = None
            if frame is None:
                link.moved = self._clock()
                held = self._sessions.give_credit(link)
                if held > 0:
                    self._wait = min(self._wait, held)
                else:
                    self._sessions.active.pop(link, None)
                return
            sent = self._transport.send_data(link.data_peer, frame)
            if sent is Sent.FULL:
                link.stuck = frame
                self._wait = min(self._wait, _FULL_RETRY)
                return
            if sent is Sent.GONE:
                self._sessions.drop(link, "its data connection broke")
                return
            link.traffic.sent += len(frame)
            link.records_sent = link.outbox.records
            link.moved = self._clock()
        self._wait = 0.0

    def _flush(self) -> None:
        deadline = self._clock() + self._timing.flush
        while self._clock() < deadline and (
            self._commands or any(link.outbox or link.stuck for link in self._sessions.ready_links())
        ):
            self._transport.poll(_FULL_RETRY)
            self._work()
