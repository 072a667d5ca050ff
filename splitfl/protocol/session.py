"""The state of a session, sans I/O. Everything that affects the state machine lives in TRANSITIONS.

Both sides run the same table over the same messages. Since messages of the two directions cross on the way, three of
them may arrive late; :meth:`ClientSession.receive` and :meth:`ServerSession.receive` say which and what they then mean.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import Any

from splitfl.errors import LocalProtocolError, OutOfTurn, RemoteProtocolError
from splitfl.protocol import schedule
from splitfl.protocol.control import SEALED
from splitfl.protocol.messages import (
    CONTROL_FROM_CLIENT,
    CONTROL_FROM_SERVER,
    EVALUATION,
    Backward,
    DataMessage,
    Enrol,
    Fault,
    Forward,
    Leave,
    Message,
    Open,
    Opened,
    Pause,
    StepClosed,
    StepDone,
    StepOpened,
    decode_control,
    encode,
)
from splitfl.protocol.schedule import TrafficSecrets


class State(Enum):
    """Where a session is. From OUT on it is open: keys exist, data may flow."""

    NEW = "new"
    GREETED = "greeted"
    WELCOMED = "welcomed"
    OPENING = "opening"
    OUT = "open, in no step"
    ENROLLED = "enrolled for the next step"
    IN_STEP = "in a step"
    DONE = "done with its part, enrolled for the next step"
    DONE_OUT = "done with its part, in no further step"
    DONE_AGAIN = "done with its part, enrolled anew for the next step"
    PARTING = "over, as soon as what was sent before Bye has arrived"
    CLOSED = "closed"


_ALIVE = {"Heartbeat": None, "Fault": None, "Fault+fatal": State.CLOSED, "Bye": State.PARTING, "Closing": State.CLOSED}
_OPEN = {
    **_ALIVE,
    "Credit": None,
    "StepClosed": None,
    "StepClosed+dropped": None,
    "RoundOpened": None,
    "RoundClosed": None,
    "AskNorm": None,  # whose step may be over for the server
    "TrunkNorm": None,
}

# state -> event -> next state (None: the same). An event is a message's class, with what matters of its content after a
# plus.
TRANSITIONS: dict[State, dict[str, State | None]] = {
    State.NEW: {"Hello": State.GREETED},
    State.GREETED: {"Welcome": State.WELCOMED, "Refused": State.CLOSED, **_ALIVE},
    State.WELCOMED: {"Open": State.OPENING, **_ALIVE},
    State.OPENING: {"Opened": State.OUT, "Refused": State.CLOSED, "Redirect": State.CLOSED, **_ALIVE},
    State.OUT: {**_OPEN, "Ends": None, "Enrol": State.ENROLLED, "Pause": None, "Leave": None},
    State.ENROLLED: {**_OPEN, "StepOpened": State.IN_STEP, "Pause": State.OUT, "Leave": State.OUT},
    State.IN_STEP: {
        **_OPEN,
        "StepDone+continue": State.DONE,
        "StepDone+pause": State.DONE_OUT,
        "StepDone+leave": State.DONE_OUT,
        "StepClosed": State.ENROLLED,
        "StepClosed+dropped": State.OUT,  # the step did not wait for this participant, nor will the next
        "Pause": State.OUT,
        "Leave": State.OUT,
    },
    State.DONE: {
        **_OPEN,
        "StepClosed": State.ENROLLED,
        "StepClosed+dropped": State.OUT,  # it crossed this participant's StepDone
        "Pause": State.DONE_OUT,
        "Leave": State.DONE_OUT,
    },
    State.DONE_OUT: {
        **_OPEN,
        "StepClosed": State.OUT,
        "StepClosed+dropped": State.OUT,
        "Enrol": State.DONE_AGAIN,
        "Pause": None,
        "Leave": None,
    },
    # An Enrol of its own outlives being dropped: the server hears it after it has dropped this participant.
    State.DONE_AGAIN: {
        **_OPEN,
        "StepClosed": State.ENROLLED,
        "StepClosed+dropped": State.ENROLLED,
        "Pause": State.DONE_OUT,
        "Leave": State.DONE_OUT,
    },
    State.PARTING: {"Closing": State.CLOSED, "Fault+fatal": State.CLOSED},
    State.CLOSED: {},
}

_DONE = frozenset({State.DONE, State.DONE_OUT, State.DONE_AGAIN})
OPEN_STATES = frozenset({State.OUT, State.ENROLLED, State.IN_STEP}) | _DONE


def event_of(message: Message) -> str:
    """The event of TRANSITIONS that a message is."""
    if isinstance(message, StepDone):
        return f"StepDone+{message.then}"
    if isinstance(message, Fault) and message.fatal:
        return "Fault+fatal"
    if isinstance(message, StepClosed) and message.dropped:
        return "StepClosed+dropped"
    return type(message).__name__


class _Session:
    """What both sides share: the state, the step, the transcript."""

    def __init__(self) -> None:
        self.state = State.NEW
        self.step: int | None = None  # the step this side believes open
        self.newest_step = -1
        self.withdrawn = -1  # the step this session left before its part was done, the newest: it alone may open anew
        self.enrolments = 0
        self.secrets: TrafficSecrets | None = None
        self._handshake: list[bytes] = []

    @property
    def is_open(self) -> bool:
        """Whether data may flow."""
        return self.state in OPEN_STATES

    def _advance(self, message: Message) -> bool:
        """Applies one message to the state; False when the table does not allow it."""
        event = event_of(message)
        allowed = TRANSITIONS[self.state]
        if event not in allowed:
            return False
        if isinstance(message, StepClosed) and message.step != self.step:
            return True  # about a step this session has left: the state is not touched
        if isinstance(message, (Pause, Leave)) and self.state is State.IN_STEP:
            self.withdrawn = self.newest_step
        self.state = allowed[event] or self.state
        if isinstance(message, Enrol):
            self.enrolments += 1
        elif isinstance(message, StepOpened):
            self.step = self.newest_step = message.step
            self.withdrawn = -1
        elif isinstance(message, (StepClosed, Pause, Leave)) and self.state is not State.DONE_OUT:
            self.step = None
        return True

    def _may_open(self, step: int) -> bool:
        """Whether a StepOpened for ``step`` is in order: later than all before, or the same anew after a withdrawal (a
        step that everybody left before anything counted opens again under its number).
        """
        return step > self.newest_step or step == self.withdrawn

    def _record(self, frame: bytes) -> None:
        if self.secrets is None and len(self._handshake) < 4:
            self._handshake.append(frame)

    def _derive(self, opened: Opened, client_secret: bytes, kem_secret: bytes) -> None:
        self.secrets = schedule.traffic_secrets(self._handshake, client_secret, opened.server_secret, kem_secret)
        self._handshake = []


_HANDSHAKE = ("Hello", "Welcome", "Open", "Opened")


class ClientSession(_Session):
    """The client's side. ``send`` gives the bytes of a message or raises LocalProtocolError; ``receive`` is its
    mirror.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kem: schedule.KemKey | None = None
        self._open: Open | None = None

    def make_open(
        self,
        *,
        ciphers: tuple[str, ...],
        model: dict[str, Any],
        cut: tuple[int, int],
        name: str,
        adapter: dict[str, Any] | None = None,
        replaces: str = "",
    ) -> Open:
        """An Open with fresh secrets."""
        self._kem = schedule.KemKey()
        secret = schedule.new_secret()
        self._open = Open(secret, self._kem.public, ciphers, model, cut, name, adapter or {}, replaces)
        return self._open

    def send(self, message: Message) -> bytes:
        """The frame to send. Raises LocalProtocolError when the state forbids this message."""
        if CONTROL_FROM_CLIENT.get(message.TYPE) is not type(message):
            raise LocalProtocolError(f"a client does not send {type(message).__name__}")
        frame = encode(message)
        if not self._advance(message):
            raise LocalProtocolError(f"{event_of(message)} cannot be sent: the session is {self.state.value}")
        if type(message).__name__ in _HANDSHAKE:
            self._record(frame)
        return frame

    def receive(self, frame: bytes) -> Message | None:
        """The server's message, or None for one to pass over: a StepOpened or StepClosed that crossed this client's
        Pause.

        Raises RemoteProtocolError, OutOfTurn; then the state is as it was.
        """
        message = decode_control(frame, from_client=False)
        if self.state is State.CLOSED:
            return None
        if self.state is State.PARTING:
            return message if self._advance(message) else None
        if isinstance(message, StepOpened):
            if message.enrolment > self.enrolments or not self._may_open(message.step):
                raise OutOfTurn(f"StepOpened for step {message.step} out of order")
            if message.enrolment < self.enrolments or self.state in (State.OUT, State.DONE_OUT):
                self.newest_step = self.withdrawn = message.step
                return None
        if isinstance(message, StepClosed) and self.is_open and message.step != self.step:
            return None
        if not self._advance(message):
            raise OutOfTurn(f"the server sent {event_of(message)} while the session is {self.state.value}")
        if type(message).__name__ in _HANDSHAKE:
            self._record(frame)
        if isinstance(message, Opened):
            assert self._open is not None
            assert self._kem is not None
            if message.cipher not in self._open.ciphers:
                raise RemoteProtocolError("the server chose a cipher this client did not offer")
            self._derive(message, self._open.client_secret, self._kem.decapsulate(message.kem_ciphertext))
            self._open = self._kem = None
        return message

    def check_send(self, message: DataMessage) -> None:
        """Raises LocalProtocolError when the state forbids this data message."""
        if not self.is_open:
            raise LocalProtocolError(f"{type(message).__name__} cannot be sent: the session is {self.state.value}")
        step = _training_step(message)
        if step is None:
            return
        # A forward of the next step may leave before that step has opened: it waits at the server, which saves a round
        # trip.
        waits = self.state in (State.DONE, State.DONE_AGAIN, State.ENROLLED)
        ahead = isinstance(message, Forward) and self.newest_step >= 0 and waits
        if step > self.newest_step + ahead:
            raise LocalProtocolError(f"{type(message).__name__} for step {step}, which has not opened")
        if step == self.step and self.state in _DONE:
            raise LocalProtocolError(f"{type(message).__name__} for step {step} after its StepDone")


class ServerSession(_Session):
    """The server's side of one session."""

    def __init__(self) -> None:
        super().__init__()
        self._open: Open | None = None

    def send(self, message: Message) -> bytes | None:
        """The frame to send, or None for a StepOpened that this client's Pause has overtaken. Raises LocalProtocolError
        when the state forbids this message.

        Whoever opens steps learns of a Pause later than this object: a StepOpened is passed over when the session is
        out of steps, or when it names an ``enrolment`` that is no longer the latest (0 stands for the latest).
        """
        if CONTROL_FROM_SERVER.get(message.TYPE) is not type(message):
            raise LocalProtocolError(f"a server does not send {type(message).__name__}")
        if isinstance(message, StepOpened):
            if not self._may_open(message.step):
                raise LocalProtocolError(f"step {message.step} is not after step {self.newest_step}")
            if self.state in (State.OUT, State.DONE_OUT) or message.enrolment not in (0, self.enrolments):
                return None
            message = replace(message, enrolment=self.enrolments)
        frame = encode(message)
        if not self._advance(message):
            raise LocalProtocolError(f"{event_of(message)} cannot be sent: the session is {self.state.value}")
        if type(message).__name__ in _HANDSHAKE:
            self._record(frame)
        return frame

    def send_opened(
        self,
        *,
        session: str,
        ticket: bytes,
        ticket_seconds: int,
        data_address: str,
        cipher: str,
        window: int,
        max_message: int,
        record: int,
        step: int = 0,
        bulk: str = SEALED,
    ) -> tuple[Opened, bytes]:
        """Opened with fresh secrets, and its frame; derives the keys. Raises RemoteProtocolError for a bad ML-KEM
        key.
        """
        if self._open is None:
            raise LocalProtocolError("Opened answers an Open, and none has come")
        asked = self._open
        kem_secret, ciphertext = schedule.encapsulate(asked.kem_public)
        opened = Opened(
            session,
            ticket,
            ticket_seconds,
            data_address,
            schedule.new_secret(),
            ciphertext,
            cipher,
            window,
            max_message,
            record,
            step,
            bulk,
        )
        frame = self.send(opened)
        assert frame is not None
        self._derive(opened, asked.client_secret, kem_secret)
        self._open = None
        return opened, frame

    def receive(self, frame: bytes) -> Message | None:
        """The client's message, or None for one to pass over.

        A StepDone for a step that has closed without it comes out as the Pause or Leave it implies, or as None.
        Raises RemoteProtocolError, OutOfTurn; then the state is as it was.
        """
        message: Message = decode_control(frame, from_client=True)
        if self.state in (State.PARTING, State.CLOSED):
            return None
        if isinstance(message, StepDone) and self.is_open and message.step != self.step:
            if message.step > self.newest_step:
                raise OutOfTurn(f"StepDone for step {message.step}, which has not opened")
            if message.then == "continue":
                return None
            message = Pause() if message.then == "pause" else Leave()
        if not self._advance(message):
            raise OutOfTurn(f"the client sent {event_of(message)} while the session is {self.state.value}")
        if type(message).__name__ in _HANDSHAKE:
            self._record(frame)
        if isinstance(message, Open):
            self._open = message
        return message

    def check_receive(self, message: DataMessage) -> None:
        """Raises RemoteProtocolError for a data message of a step this client was never told of. A stale one passes: it
        crossed the closing of its step, and is the scheduler's to answer.
        """
        step = _training_step(message)
        # Whatever the state: the StepDone before it may still be under way on the other connection, or a Pause have
        # come first.
        ahead = isinstance(message, Forward) and self.newest_step >= 0
        if step is not None and step > self.newest_step + ahead:
            raise RemoteProtocolError(f"{type(message).__name__} for step {step}, which has not opened")


def _training_step(message: DataMessage) -> int | None:
    """The step whose gradients this message belongs to, if any."""
    if isinstance(message, Backward):
        return message.step
    if isinstance(message, Forward) and (message.train or message.grad) and message.step != EVALUATION:
        return message.step
    return None
