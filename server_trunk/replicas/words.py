"""What replicas say to one another: small words between each replica and rank 0. Pure; no torch.

They travel between processes of one server, which trust each other: :func:`decode` checks form, not intent.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, field, fields
from enum import IntEnum
from typing import Any

import msgpack

from splitfl.errors import RemoteProtocolError

__all__ = [
    "Bye",
    "Close",
    "Drain",
    "GoBack",
    "Grant",
    "Move",
    "Phase",
    "Presence",
    "State",
    "Stays",
    "Stop",
    "StopAsked",
    "WaitedFor",
    "Word",
    "decode",
    "encode",
]


class Phase(IntEnum):
    """Where a replica stands in the open round."""

    OUT = 0  # it takes no part
    IN = 1  # it was granted the round, and is not done with it
    WHOLE = 2  # all that is awaited of it is done


@dataclass(frozen=True, slots=True)
class State:
    """To rank 0: where this replica stands, having heard ``heard`` grants and closings.

    ``step``: its open step, or the next. ``enrolled``: sessions that wait for a step to open; ``held``: lost ones whose return it
    would wait for. ``counted``: target tokens by client since replicas met, of what is whole; ``participants``: in the step
    at which they meet. ``holds``: before the first step of a run that is taken up again, the steps after which all who are here
    can go on; None: any. ``movable``: clients here, enrolled for the next step, that would go on at another replica.
    """

    heard: int
    phase: Phase
    step: int
    enrolled: int = 0
    held: int = 0
    counted: dict[str, int] = field(default_factory=dict)
    participants: int = 0
    holds: tuple[int, ...] | None = None
    movable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "phase", Phase(self.phase))  # comes as a number
        object.__setattr__(self, "movable", tuple(self.movable))
        object.__setattr__(self, "holds", None if self.holds is None else tuple(self.holds))


@dataclass(frozen=True, slots=True)
class Presence:
    """To rank 0: who is at this replica. ``tokens``: by present client, of each step; ``here``: the clients that have a session;
    ``awaited``: others whose return is waited for; ``trained``: whether a step has closed, or none will.
    """

    tokens: dict[str, float] = field(default_factory=dict)
    here: tuple[str, ...] = ()
    awaited: tuple[str, ...] = ()
    trained: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "here", tuple(self.here))  # come as lists
        object.__setattr__(self, "awaited", tuple(self.awaited))


@dataclass(frozen=True, slots=True)
class StopAsked:
    """To rank 0: this replica was asked to end, so all will; once the open round is over, if that takes at most ``patience``
    seconds.
    """

    patience: float = 0.0


@dataclass(frozen=True, slots=True)
class Stays:
    """To rank 0, and on to ``rank``: the client that was to move there does not come."""

    client: str
    rank: int


@dataclass(frozen=True, slots=True)
class Grant:
    """From rank 0: take part, from ``step`` on."""

    step: int


@dataclass(frozen=True, slots=True)
class WaitedFor:
    """From rank 0: the part of some other replica is whole."""


@dataclass(frozen=True, slots=True)
class Move:
    """A client goes from one replica to another, between two steps. ``number``: of rank 0's newest decision about it, each of
    which all replicas hear in one order. In a Close: it is to go. To rank 0: the origin lets go of it, or, as it has come there
    by itself, the target asks for it. From rank 0: it is asked for, where no newer decision was made, or that is the decision.
    """

    client: str
    origin: int
    target: int
    number: int = 0


@dataclass(frozen=True, slots=True)
class Close:
    """From rank 0: ``step`` closes, here too. ``opens``: this replica is granted the next one. ``counted``, ``participants``: of
    all replicas. ``move``: who goes elsewhere before the next one.
    """

    step: int
    opens: bool
    counted: dict[str, int] = field(default_factory=dict)
    participants: int = 0
    move: Move | None = None

    def __post_init__(self) -> None:
        if self.move is not None and not isinstance(self.move, Move):
            object.__setattr__(self, "move", Move(*self.move))  # comes as a list


@dataclass(frozen=True, slots=True)
class GoBack:
    """From rank 0: the run stands after ``step`` again."""

    step: int


@dataclass(frozen=True, slots=True)
class Drain:
    """From rank 0: begin no further step."""


@dataclass(frozen=True, slots=True)
class Stop:
    """From rank 0: no step closes any more. ``back``: the server means to start again, so that clients wait for it. ``now``: nor
    does a round of the clients' ends come to its end; may follow one without.
    """

    back: bool = False
    now: bool = False


@dataclass(frozen=True, slots=True)
class Bye:
    """Nothing more comes from this side."""


Word = State | Presence | Stays | Move | StopAsked | Grant | WaitedFor | Close | GoBack | Drain | Stop | Bye

_KINDS: tuple[type[Any], ...] = (State, Presence, Stays, Move, StopAsked, Grant, WaitedFor, Close, GoBack, Drain, Stop, Bye)


def encode(word: Word) -> bytes:
    packed: bytes = msgpack.packb([_KINDS.index(type(word)), *astuple(word)])
    return packed


def decode(data: bytes) -> Word:
    """Raises RemoteProtocolError for what is no word."""
    try:
        kind, *values = msgpack.unpackb(data)
        cls = _KINDS[kind]
        if len(values) != len(fields(cls)):
            raise ValueError(f"{len(values)} values for {cls.__name__}")
        word: Word = cls(*values)
    except Exception as error:
        raise RemoteProtocolError(f"a word between replicas that is none ({error}): do all run the same splitfl?") from None
    return word
