"""The client's channel: one session with a server, on one I/O thread that owns the connections and does all sealing."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from splitfl.channel.datapath import DataPath, data_address, outgoing
from splitfl.channel.opening import Opening, OpenTerms, follow
from splitfl.channel.parting import Parting
from splitfl.channel.tally import Tally
from splitfl.channel.timing import Timing
from splitfl.errors import (
    ConnectError,
    LocalProtocolError,
    OutOfTurn,
    RemoteProtocolError,
    SealError,
    SessionLost,
    SplitflError,
)
from splitfl.protocol.assembly import Allocate, largest_frame
from splitfl.protocol.ciphers import AeadFactory, Buffer, make_aead
from splitfl.protocol.control import CURVE
from splitfl.protocol.join import JoinString
from splitfl.protocol.keys import Identity
from splitfl.protocol.messages import (
    Attach,
    Attached,
    Closing,
    ControlMessage,
    Credit,
    DataMessage,
    Fault,
    Heartbeat,
    Opened,
    OtherVersionError,
    Welcome,
)
from splitfl.protocol.session import ClientSession, State
from splitfl.transport import wording
from splitfl.transport.base import ClientFrame, ClientTransport, Endpoint
from splitfl.transport.zmq_client import ZmqClientTransport

_log = logging.getLogger(__name__)

OnData = Callable[[DataMessage, Any], None]
OnControl = Callable[[ControlMessage], None]
OnLost = Callable[[SplitflError], None]


class ClientChannel:
    """An open session. Made by :meth:`open`; ``send``, ``tell`` and ``close`` may be called from any thread."""

    welcome: Welcome
    opened: Opened
    _thread: threading.Thread

    @classmethod
    def open(
        cls,
        join: JoinString,
        identity: Identity,
        *,
        name: str,
        libraries: dict[str, str],
        answer: Callable[[Welcome], OpenTerms],
        allocate: Allocate,
        on_data: OnData,
        on_control: OnControl,
        on_lost: OnLost,
        transport: ClientTransport | None = None,
        timeout: float = 10.0,
        timing: Timing | None = None,
        aead_factory: AeadFactory = make_aead,
    ) -> ClientChannel:
        """Opens a session and returns when both connections stand and both sides have proven their keys.

        ``answer`` runs on the caller's thread and may take its time; a SplitflError it raises is raised here.
        ``allocate`` gives (object, writable view of exactly ``payload_bytes``); ``on_data`` gets that object once the
        last tag has verified. These two, ``on_control`` (StepOpened, StepClosed, Fault that is not fatal) and
        ``on_lost`` run on the I/O thread: they must not block. ``on_lost`` is called once, after it nothing is; never
        after ``close``.

        A server that has several endpoints may name another of them, once; its key must be the same.

        ``timeout``: seconds that any one answer of the server may take. ``aead_factory`` is for benchmarks and tests.
        Raises Refused (the server said no), ConnectError (it could not be reached or is another), RemoteProtocolError.
        """
        callbacks = (allocate, on_data, on_control, on_lost)

        def open_at(join: JoinString, answer: Callable[[Welcome], OpenTerms]) -> ClientChannel:
            opening, carrier = Opening(join, name, libraries, timeout), transport or ZmqClientTransport()
            return cls(join, identity, opening, callbacks, carrier, timeout, timing or Timing(), aead_factory)._open(answer)

        return follow(open_at, join, answer, may_move=transport is None)

    def _open(self, answer: Callable[[Welcome], OpenTerms]) -> ClientChannel:
        """As :meth:`open`, at one address. Raises Elsewhere where another is to be asked."""
        self._thread.start()
        try:
            self.welcome = self._opening.welcome()
            self._ask_to_open(answer(self.welcome))
            self.opened = self._opening.opened()
        except BaseException:
            self._parting.is_abandoned = True
            self.close(leave=False)
            raise
        return self

    def __init__(
        self,
        join: JoinString,
        identity: Identity,
        opening: Opening,
        callbacks: tuple[Allocate, OnData, OnControl, OnLost],
        transport: ClientTransport,
        timeout: float,
        timing: Timing,
        aead_factory: AeadFactory,
    ) -> None:
        self._join, self._identity, self._opening = join, identity, opening
        self._allocate, self._on_data, self._on_control, self._on_lost = callbacks
        self._transport, self._timeout, self._timing, self._aead = transport, timeout, timing, aead_factory
        # Guards the session and the two queues: a message's place in the state machine is its place on the wire.
        self._lock = threading.Lock()
        self._session = ClientSession()
        self._control_queue: deque[bytes] = deque()
        self._data_queue: deque[tuple[DataMessage, memoryview]] = deque()
        self._error: SplitflError | None = None
        self._parting = Parting(timing.flush)
        self.ended_by = ""  # the code of the Fault by which the server has ended the session
        self._opened: Opened | None = None
        self._path: DataPath | None = None  # from Opened on
        self._heard = self._beat = time.monotonic()
        self._sent = self._received = 0
        self._told = 0  # control messages that have left
        self._tally = Tally(self._timing.overdue)
        self._thread = threading.Thread(target=self._run, name=f"splitfl-client-{opening.name}", daemon=True)

    @property
    def window(self) -> int:
        """The credit granted, bytes of payload."""
        return self.opened.window

    @property
    def max_message(self) -> int:
        """The largest payload, bytes."""
        return self.opened.max_message

    @property
    def bytes_sent(self) -> int:
        """Bytes of frames sent so far, control and data, sealing included."""
        return self._sent + (self._path.bytes_sent if self._path is not None else 0)

    @property
    def bytes_received(self) -> int:
        """Bytes of frames received so far."""
        return self._received

    # --- any thread -------------------------------------------------------------------------------------------------

    def send(self, message: DataMessage, payload: Buffer) -> None:
        """Queues a data message and returns at once. ``payload`` (any contiguous buffer) must not change until it is
        sealed.

        Raises LocalProtocolError (wrong size, wrong state, larger than ``max_message``), SessionLost when the session
        is over.
        """
        view = outgoing(message, payload, self.max_message)
        with self._lock:
            self._check_alive()
            self._session.check_send(message)
            self._data_queue.append((message, view))
        self._transport.wake()

    def tell(self, message: ControlMessage) -> None:
        """Queues a control message. Raises LocalProtocolError when the state forbids it, SessionLost when the session
        is over.
        """
        with self._lock:
            self._check_alive()
            self._control_queue.append(self._session.send(message))
        self._transport.wake()

    def close(self, *, leave: bool = True) -> None:
        """Sends what is queued (bounded wait), then Leave if ``leave``, then Bye; joins the thread. A second call is nothing."""
        with self._lock:
            self._parting.want(leave=leave)
        self._transport.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check_alive(self) -> None:
        if self._error is not None:
            raise SessionLost(str(self._error), getattr(self._error, "code", "lost"))
        if self._parting.is_wanted:
            raise SessionLost("the session is closed", "closed")

    def _ask_to_open(self, terms: OpenTerms) -> None:
        with self._lock:
            self._check_alive()
            self._control_queue.append(self._session.send(self._opening.open(self._session, terms)))
        self._transport.wake()

    # --- the I/O thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        linger = 0.0
        try:
            self._transport.connect_control(self._join.host, self._join.port, self._join.key, self._identity, self._timeout)
            with self._lock:
                self._control_queue.append(self._session.send(self._opening.hello()))
            self._heard = self._beat = time.monotonic()
            while not self._closed():
                self._turn()
            linger = self._timing.linger
        except SplitflError as error:
            self._lose(error)
        except Exception:
            _log.exception("the client's I/O thread failed")
            self._lose(SessionLost("the client's I/O thread failed: the log says where", "internal"))
        finally:
            self._transport.close(linger)
            self._opening.failed(SessionLost("the session was closed", "closed"))

    def _turn(self) -> None:
        now = time.monotonic()
        busy = self._pump_data()
        self._pump_control()
        for frame in self._transport.poll(0.0 if busy else self._patience(now)):
            self._take(frame)
        self._keep_alive()

    def _patience(self, now: float) -> float:
        until = min(self._beat + self._timing.heartbeat, self._heard + self._timing.silence)
        return max(0.0, self._parting.look_again(until, more=self._has_more) - now)

    def _closed(self) -> bool:
        """Whether close() was asked for, all is sent that can be, and the server has answered our Bye (or time is up)."""
        if not self._parting.is_wanted:
            return False
        if not self._parting.has_begun:
            if self._has_more and not self._parting.is_late:
                return False
            self._say_goodbye()
        return self._parting.is_late or self._session.state is State.CLOSED

    @property
    def _has_more(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._control_queue or self._data_queue or self._path)

    @property
    def _records_sent(self) -> int:
        return self._path.records_sent if self._path is not None else 0

    def _say_goodbye(self) -> None:
        with self._lock:
            for message in self._parting.begin(self._records_sent):
                try:
                    self._control_queue.append(self._session.send(message))
                except LocalProtocolError:
                    continue  # the handshake had not come so far that the server would expect it
        self._pump_control()

    def _pump_control(self) -> None:
        while self._control_queue:
            frame = self._control_queue.popleft()
            self._transport.send_control(frame)
            self._sent += len(frame)
            self._told += 1

    def _pump_data(self) -> bool:
        if self._path is None:
            return False
        while self._data_queue:
            self._path.add(*self._data_queue.popleft())
        return self._path.pump(self._transport)

    def _take(self, incoming: ClientFrame) -> None:
        self._heard = time.monotonic()
        self._received += len(incoming.frame)
        if incoming.endpoint is Endpoint.CONTROL:
            self._tally.heard += 1
            try:
                with self._lock:
                    message = self._session.receive(bytes(incoming.frame))
            except OtherVersionError as error:
                raise wording.other_version("server", error.theirs, "client") from None
            except OutOfTurn as error:
                self._tally.doubt(error, self._heard)
                return
            if isinstance(message, Fault) and message.fatal:
                self.ended_by = message.code  # also where this side is parting
            passed_over = self._tally.is_in_doubt and not isinstance(message, Heartbeat | Fault | Closing)
            if message is not None and not self._parting.has_begun and not passed_over:
                self._control(message)
            return
        if self._parting.has_begun:
            return  # an answer that nobody waits for any more
        if self._path is None:
            raise RemoteProtocolError("the server sent data before the session was open")
        done = self._path.receive(incoming.frame)
        if done is None:
            return
        data, target = done
        if isinstance(data, Attached):
            assert self._opened is not None
            if self._opening.is_over:
                raise RemoteProtocolError("the server sent Attached twice")
            # Read by send() through ``opened``, before open() returns to its caller.
            self.opened = self._opened
            self._opening.attached(self._opened)
        else:
            self._on_data(data, target)

    def _control(self, message: ControlMessage) -> None:
        if self._opening.take(message):
            return
        if isinstance(message, Opened):
            self._attach(message)
        elif isinstance(message, Credit):
            assert self._path is not None, "the session takes none before Opened"
            self._path.credit.receive(message.bytes)
        elif isinstance(message, Fault) and message.fatal:
            raise SessionLost(message.text, message.code)
        elif isinstance(message, Closing):
            raise SessionLost(f"the server closed the session: {message.text}", "restarting" if message.back else "closing")
        elif isinstance(message, Heartbeat):
            self._tally.check(message, self._path.records_received if self._path is not None else 0, time.monotonic())
        else:
            self._on_control(message)

    def _attach(self, opened: Opened) -> None:
        """Connects the data endpoint and proves our keys on it."""
        host, port = data_address(opened.data_address, self._join.host)
        secrets = self._session.secrets
        assert secrets is not None
        self._opened = opened
        self._path = DataPath(
            opened,
            secrets,
            aead_factory=self._aead,
            allocate=self._allocate,
            admit=self._admit,
            make_frame=self._transport.make_frame,
        )
        self._transport.set_frame_limit(largest_frame(opened.record))
        curve = self._join.key if opened.bulk == CURVE else None
        self._transport.connect_data(host, port, opened.ticket, self._timeout, curve=curve)
        self._path.add(Attach(), b"")

    def _admit(self, message: DataMessage) -> None:
        if not isinstance(message, Attached) and not self._opening.is_over:
            raise RemoteProtocolError("the server sent data before Attached")

    def _keep_alive(self) -> None:
        now = time.monotonic()
        if now - self._heard >= self._timing.silence:
            raise SessionLost(f"the server has been silent for {self._timing.silence:g} s")
        self._tally.check_doubt(now, self._timing.silence)
        if now - self._beat >= self._timing.heartbeat and not self._parting.has_begun:
            self._beat = now
            with self._lock:
                # Between Hello and Welcome there is nobody to hear it yet.
                if self._opening.is_welcomed:
                    beat = Heartbeat(time.time(), self._told + len(self._control_queue), self._records_sent)
                    self._control_queue.append(self._session.send(beat))

    def _lose(self, error: SplitflError) -> None:
        with self._lock:
            self._error = error
            silent = self._parting.is_wanted
        opening = not self._opening.is_over
        if opening and isinstance(error, SessionLost | SealError):
            error = ConnectError(f"no session was opened: {error}")
        self._opening.failed(error)
        if not opening and not silent:
            try:
                self._on_lost(error)
            except Exception:
                _log.exception("on_lost failed")
