"""Control messages of an open session: step barriers, rounds, credits, heartbeats, faults; and what all control messages share.
They travel inside CURVE, at most 64 KiB each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from splitfl.protocol.fields import (
    MAX_INTEGER,
    boolean,
    integer,
    number,
    one_of,
    optional,
    pair,
    sequence,
    short_text,
)
from splitfl.protocol.message import Message

MAX_STEP = MAX_INTEGER
MAX_MICRO = 2**31 - 1
MAX_COUNT = 2**31 - 1

#: Steps that one Enrol may name.
MAX_HELD = 16

SECRET_BYTES = 32
TICKET_BYTES = 32
KEM_PUBLIC_BYTES = 1184  # ML-KEM-768 encapsulation key, FIPS 203 table 3
KEM_CIPHERTEXT_BYTES = 1088

# How the data endpoint is gated: a ticket shown as a password, or one that is a CURVE key, so that frames are CURVE's too.
SEALED, CURVE = "sealed", "curve"
BULK = frozenset({SEALED, CURVE})

# Tensors that one Ends names: their names fit a control frame.
MAX_NAMED = 128
MAX_DIMENSION = 2**40

# Bytes of one element. A further dtype (float8) is a further row.
DTYPES: dict[str, int] = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


class RefusalCode:
    """The words of :class:`Refused` and :class:`Fault`. A peer may send others: they are text to show, not to act
    on.
    """

    PROTOCOL_VERSION = "protocol-version"
    UNKNOWN_RUN = "unknown-run"
    MODEL_MISMATCH = "model-mismatch"
    CUT_MISMATCH = "cut-mismatch"
    ADAPTER = "adapter"
    ENDS = "ends"
    NOT_AUTHORIZED = "not-authorized"
    FULL = "full"
    CIPHER = "cipher"
    PROTOCOL = "protocol"
    SEAL = "seal"
    STALE = "stale"
    MOVED = "moved"
    NOT_COUNTED = "not-counted"
    EVICTED = "evicted"
    CACHE_FULL = "cache-full"
    INTERNAL = "internal"


@dataclass(frozen=True)
class Enrol(Message):
    """Makes this session a participant of the next step to open. ``held``: steps after which this client can go on, newest first:
    as it stands, or from what it has kept; none where it has yet to take part in its first. ``moves``: between two steps its
    session may be ended, to be opened again at another endpoint of the server (a fatal Fault ``moved``).
    """

    held: tuple[int, ...] = ()
    moves: bool = False

    TYPE: ClassVar[int] = 3
    FIELDS: ClassVar = {"held": sequence(integer(0, MAX_STEP), 0, MAX_HELD), "moves": boolean}


@dataclass(frozen=True)
class StepDone(Message):
    """Ends this client's part of a step. The counts let the server wait for data still under way on the other
    connection. ``ends_norm``: where the run clips both sides together, the norm of the gradient of the ends, before clipping.
    """

    step: int
    forwards: int
    backwards: int
    then: str
    ends_norm: float | None = None

    TYPE: ClassVar[int] = 4
    FIELDS: ClassVar = {
        "step": integer(0, MAX_STEP),
        "forwards": integer(0, MAX_COUNT),
        "backwards": integer(0, MAX_COUNT),
        "then": one_of(frozenset({"continue", "pause", "leave"})),
        "ends_norm": optional(number(0.0)),
    }


@dataclass(frozen=True)
class AskNorm(Message):
    """Asks for the norm of the trunk's gradient of the open step, once so many gradients of this session have run. Where the run
    clips both sides together, a client asks before it clips its own.
    """

    step: int
    backwards: int

    TYPE: ClassVar[int] = 10
    FIELDS: ClassVar = {"step": integer(0, MAX_STEP), "backwards": integer(1, MAX_COUNT)}


@dataclass(frozen=True)
class Pause(Message):
    """Withdraws from the next step to open (and from an open one, if its part is not done). ``Enrol`` comes back."""

    TYPE: ClassVar[int] = 5
    FIELDS: ClassVar = {}


@dataclass(frozen=True)
class Leave(Message):
    """As :class:`Pause`, and the run need not wait for this client again."""

    TYPE: ClassVar[int] = 6
    FIELDS: ClassVar = {}


@dataclass(frozen=True)
class Heartbeat(Message):
    """I am here, and this is what you should have of me. ``time``: the sender's clock, seconds since the Unix epoch.
    ``control``: how many messages it has sent on the control connection before this one (0: it does not say); ``records``: how
    many records on the data connection.
    """

    time: float
    control: int = 0
    records: int = 0

    TYPE: ClassVar[int] = 7
    FIELDS: ClassVar = {"time": number(), "control": integer(0), "records": integer(0)}


@dataclass(frozen=True)
class Bye(Message):
    """The client ends the session in good order. ``records``: how many it has sent on the data connection, so that the
    server can take those that are still under way.
    """

    records: int = 0

    TYPE: ClassVar[int] = 8
    FIELDS: ClassVar = {"records": integer(0)}


@dataclass(frozen=True)
class Ends(Message):
    """What this client trains of its ends, in a run that averages them: (name, (dtype, shape)) of each tensor, by ascending name.
    ``more``: another Ends goes on where this one stops.
    """

    tensors: tuple[tuple[str, tuple[str, tuple[int, ...]]], ...]
    more: bool = False

    TYPE: ClassVar[int] = 9
    FIELDS: ClassVar = {
        "tensors": sequence(
            pair(short_text(256, empty=False), pair(one_of(DTYPES), sequence(integer(1, MAX_DIMENSION), 0, 8))), 1, MAX_NAMED
        ),
        "more": boolean,
    }


@dataclass(frozen=True)
class StepOpened(Message):
    """Step ``step`` is open and this session takes part.

    ``enrolment`` is filled in by the session when it is sent: the number of Enrol messages the server has seen from
    this client. It lets the client tell a step opened before its Pause arrived from one opened after it enrolled again.
    """

    step: int
    enrolment: int = 0

    TYPE: ClassVar[int] = 36
    FIELDS: ClassVar = {"step": integer(0, MAX_STEP), "enrolment": integer(0, MAX_COUNT)}


@dataclass(frozen=True)
class StepClosed(Message):
    """The step is done for this session. ``targets``: counted target tokens of all participants; ``counted``: those of this
    one; ``grad_norm`` before clipping. ``dropped``: the step did not wait for this session's part, which is out of steps until it
    enrols again. ``staleness``: optimizer steps made since the oldest forward of this session's part (asynchronous mode).
    ``checkpoint``: the server has kept the run as it is after this step.
    """

    step: int
    targets: int
    participants: int
    learning_rate: float
    grad_norm: float | None
    counted: int = 0
    dropped: bool = False
    staleness: int = 0
    checkpoint: bool = False

    TYPE: ClassVar[int] = 37
    FIELDS: ClassVar = {
        "step": integer(0, MAX_STEP),
        "targets": integer(0),
        "participants": integer(0, MAX_COUNT),
        "learning_rate": number(0.0),
        "grad_norm": optional(number(0.0)),
        "counted": integer(0),
        "dropped": boolean,
        "staleness": integer(0, MAX_COUNT),
        "checkpoint": boolean,
    }


@dataclass(frozen=True)
class TrunkNorm(Message):
    """Answers AskNorm: the norm of the trunk's gradient of ``step`` as it is summed by then, over the counted targets; None where
    nothing of it is to be used.
    """

    step: int
    norm: float | None

    TYPE: ClassVar[int] = 45
    FIELDS: ClassVar = {"step": integer(0, MAX_STEP), "norm": optional(number(0.0))}


@dataclass(frozen=True)
class Credit(Message):
    """Gives ``bytes`` of payload credit back to the client."""

    bytes: int

    TYPE: ClassVar[int] = 38
    FIELDS: ClassVar = {"bytes": integer(1, 2**40)}


@dataclass(frozen=True)
class Fault(Message):
    """Something went wrong. ``fatal`` ends the session; else ``micro`` names the micro-batch it is about."""

    code: str
    text: str
    fatal: bool = True
    micro: int | None = None

    TYPE: ClassVar[int] = 40
    FIELDS: ClassVar = {
        "code": short_text(64, empty=False),
        "text": short_text(4096),
        "fatal": boolean,
        "micro": optional(integer(0, MAX_MICRO)),
    }


@dataclass(frozen=True)
class RoundOpened(Message):
    """Round ``round`` averages the ends: this client is to send its own."""

    round: int

    TYPE: ClassVar[int] = 42
    FIELDS: ClassVar = {"round": integer(0, MAX_STEP)}


@dataclass(frozen=True)
class RoundClosed(Message):
    """Round ``round`` is over. ``members``: clients whose ends were averaged, weighted by their share of ``targets``; the average
    comes as AveragePart messages. With no member nothing comes, and the ends stay as they are.
    """

    round: int
    members: int
    targets: int

    TYPE: ClassVar[int] = 43
    FIELDS: ClassVar = {"round": integer(0, MAX_STEP), "members": integer(0, MAX_COUNT), "targets": integer(0)}


@dataclass(frozen=True)
class Closing(Message):
    """The server stops, in good order. ``back``: it means to be back before long, to go on with the run."""

    text: str
    back: bool = False

    TYPE: ClassVar[int] = 41
    FIELDS: ClassVar = {"text": short_text(4096), "back": boolean}
