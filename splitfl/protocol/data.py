"""Data messages: hidden states and gradients at the two cuts. Each carries one payload of ``payload_bytes`` raw bytes, or none.

A payload is a contiguous ``(rows, hidden)`` array of ``dtype``, little-endian, row by row, in the codec's encoding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from splitfl.errors import LocalProtocolError
from splitfl.protocol.control import DTYPES, MAX_COUNT, MAX_MICRO, MAX_STEP
from splitfl.protocol.fields import boolean, integer, number, one_of, pair, sequence
from splitfl.protocol.message import Message

# Bytes on the wire as a function of (rows, hidden, dtype) belong to the codec; "raw" is the identity.
CODECS = frozenset({"raw"})

EVALUATION = -1  # the step of a forward that belongs to no step
MAX_SEGMENTS = 8192
MAX_ROWS = 2**31 - 1
MAX_HIDDEN = 2**24
MAX_PAYLOAD_BYTES = 2**40
MAX_SEQUENCE = 2**31 - 1
NO_PARENT = -1  # a sequence that begins with the rows it comes with

_step = integer(0, MAX_STEP)
_step_or_evaluation = integer(EVALUATION, MAX_STEP)
_micro = integer(0, MAX_MICRO)
_rows = integer(1, MAX_ROWS)
_hidden = integer(1, MAX_HIDDEN)
_dtype = one_of(DTYPES)
_codec = one_of(CODECS)
_sequence = integer(0, MAX_SEQUENCE)


@dataclass(frozen=True)
class DataMessage(Message):
    """What all data messages have: a payload. ``payload_bytes``: its size, exactly rows x hidden x item size; it follows from the
    other fields.
    """

    payload_bytes: int = field(init=False, repr=False, compare=False)

    @property
    def items(self) -> int:
        """Entries of its metadata that are looked at one by one."""
        return 0

    def check(self) -> None:
        self._carries(0)

    def _carries(self, size: int) -> None:
        """Notes the size of the payload, bytes. Raises LocalProtocolError."""
        if size > MAX_PAYLOAD_BYTES:
            raise LocalProtocolError(f"{type(self).__name__}: a payload must have at most {MAX_PAYLOAD_BYTES} bytes")
        self.__dict__["payload_bytes"] = size


@dataclass(frozen=True)
class Attach(DataMessage):
    """First on a data connection: proves that this peer holds the session's keys. No payload."""

    TYPE: ClassVar[int] = 64
    FIELDS: ClassVar = {}


@dataclass(frozen=True)
class Forward(DataMessage):
    """Hidden states of one micro-batch at the first cut, client to server; payload ``(rows, hidden)``.

    ``segments``: (length, start position) of each run of consecutive tokens; ``rows``: the sum of the lengths. ``train`` is
    the mode of the trunk (dropout), ``grad`` keeps the graph for a Backward, ``adapter_on`` turns the trunk's adapter
    on. ``ordinal``: which of this client's forwards with ``grad`` in this step it is, from 0; 0 for others.

    ``sequences``: in decoding, for each segment ``(sequence, (parent, kept))``: the segment follows the first ``kept`` tokens of
    the sequence ``parent``, whose keys and values the trunk has, and the whole is from now on the client's ``sequence``. All
    parents are meant as they were before this message, so what a message writes it may also read.
    """

    step: int
    micro: int
    segments: tuple[tuple[int, int], ...]
    hidden: int
    dtype: str
    codec: str
    train: bool
    grad: bool
    adapter_on: bool
    ordinal: int = 0
    sequences: tuple[tuple[int, tuple[int, int]], ...] = ()
    rows: int = field(init=False, repr=False, compare=False)

    TYPE: ClassVar[int] = 65
    FIELDS: ClassVar = {
        "step": _step_or_evaluation,
        "micro": _micro,
        "segments": sequence(pair(integer(1, MAX_ROWS), integer(0, MAX_COUNT)), 1, MAX_SEGMENTS),
        "hidden": _hidden,
        "dtype": _dtype,
        "codec": _codec,
        "train": boolean,
        "grad": boolean,
        "adapter_on": boolean,
        "ordinal": integer(0, MAX_COUNT),
        "sequences": sequence(pair(_sequence, pair(integer(NO_PARENT, MAX_SEQUENCE), integer(0, MAX_ROWS))), 0, MAX_SEGMENTS),
    }

    @property
    def items(self) -> int:
        return len(self.segments) + len(self.sequences)

    def check(self) -> None:
        rows = sum([length for length, _ in self.segments])
        self.__dict__["rows"] = rows
        self._carries(rows * self.hidden * DTYPES[self.dtype])
        if rows > MAX_ROWS:
            raise LocalProtocolError(f"Forward.segments must have at most {MAX_ROWS} tokens")
        if self.train and self.step == EVALUATION:
            raise LocalProtocolError("Forward.step must name a step when train is set")
        if self.sequences:
            self._check_sequences()

    def _check_sequences(self) -> None:
        if self.train or self.grad:
            raise LocalProtocolError("Forward.sequences must be empty when train or grad is set")
        if len(self.sequences) != len(self.segments):
            raise LocalProtocolError("Forward.sequences must name one sequence for each segment")
        if len({number for number, _ in self.sequences}) < len(self.sequences):
            raise LocalProtocolError("Forward.sequences must name each sequence once")
        if any((parent == NO_PARENT) != (kept == 0) for _, (parent, kept) in self.sequences):
            raise LocalProtocolError("Forward.sequences must keep one token or more of a parent, and none without one")


@dataclass(frozen=True)
class Release(DataMessage):
    """The client has no more use for these sequences: their keys and values may go. Client to server, no payload."""

    sequences: tuple[int, ...]

    TYPE: ClassVar[int] = 68
    FIELDS: ClassVar = {"sequences": sequence(_sequence, 1, MAX_SEGMENTS)}

    @property
    def items(self) -> int:
        return len(self.sequences)


@dataclass(frozen=True)
class Tensor(DataMessage):
    """What Backward, Hidden and Grad share."""

    step: int
    micro: int
    rows: int
    hidden: int
    dtype: str
    codec: str

    def check(self) -> None:
        self._carries(self.rows * self.hidden * DTYPES[self.dtype])


_TENSOR = {
    "step": _step_or_evaluation,
    "micro": _micro,
    "rows": _rows,
    "hidden": _hidden,
    "dtype": _dtype,
    "codec": _codec,
}


@dataclass(frozen=True)
class Backward(Tensor):
    """Gradient of the client's loss with respect to Hidden, at the second cut; payload ``(rows, hidden)``.

    ``targets``: target tokens in this micro-batch; ``divisor``: what the client's loss was divided by;
    ``want_grad``: whether a Grad is to come back (not where the client's input end is frozen).
    """

    targets: int
    divisor: float
    want_grad: bool = True

    TYPE: ClassVar[int] = 66
    FIELDS: ClassVar = {**_TENSOR, "step": _step, "targets": integer(0), "divisor": number(0.0, above=True), "want_grad": boolean}


@dataclass(frozen=True)
class _Part(DataMessage):
    """A piece of one tensor of the ends: ``size`` bytes from ``offset`` on. ``tensor``: its place in the client's Ends."""

    round: int
    tensor: int
    offset: int
    size: int

    FIELDS: ClassVar = {
        "round": integer(0, MAX_STEP),
        "tensor": integer(0, MAX_COUNT),
        "offset": integer(0),
        "size": integer(1, MAX_COUNT),
    }

    def check(self) -> None:
        self._carries(self.size)


@dataclass(frozen=True)
class EndsPart(_Part):
    """A piece of this client's ends, for the average of a round; payload ``(size,)`` bytes."""

    TYPE: ClassVar[int] = 67


@dataclass(frozen=True)
class Attached(DataMessage):
    """Answers :class:`Attach`: the server's side holds the same keys. No payload."""

    TYPE: ClassVar[int] = 96
    FIELDS: ClassVar = {}


@dataclass(frozen=True)
class Hidden(Tensor):
    """The trunk's output for one Forward, server to client; payload ``(rows, hidden)``."""

    TYPE: ClassVar[int] = 97
    FIELDS: ClassVar = _TENSOR


@dataclass(frozen=True)
class Grad(Tensor):
    """Gradient with respect to Forward's hidden states, unweighted, server to client; payload ``(rows, hidden)``."""

    TYPE: ClassVar[int] = 98
    FIELDS: ClassVar = _TENSOR


@dataclass(frozen=True)
class AveragePart(_Part):
    """A piece of the average of a round, server to client; payload ``(size,)`` bytes."""

    TYPE: ClassVar[int] = 99
