"""Pieces of work on their way through the trunk, and the batches they run in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from splitfl.protocol.messages import Backward, Forward

__all__ = ["NOT_FINITE", "NO_TARGETS", "BackwardBatch", "ForwardBatch", "Member"]

#: Why the gradient of a micro-batch counts as zero.
NOT_FINITE, NO_TARGETS = "not-finite", "no-targets"


@dataclass(slots=True, eq=False)
class Member:
    """One micro-batch of one session. ``hidden`` is ``(tokens, hidden)``, as is ``gradient``.

    ``client``: the operator's name of whose it is. ``ordinal``: which training forward of that client's step it is, from 0.
    ``replayed``: its gradient is in the step's sum already, from before its client was lost: it runs for its answers only.
    """

    session: str
    forward: Forward
    hidden: Any
    client: str = ""
    ordinal: int = 0
    replayed: bool = False
    arrived: float = 0.0  # when, by time.monotonic
    backward: Backward | None = None
    gradient: Any = None
    returned: float | None = None  # when its gradient arrived
    abandoned: bool = False
    spoilt: str = ""  # why its gradient counts as zero, if it does
    kept: bool = True  # its graph is; else `hidden` is, and the forward runs again for the backward
    longest: int = field(init=False)  # of its segments, in tokens
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.longest = max(length for length, _ in self.forward.segments)
        self.tokens = self.forward.rows

    @property
    def segments(self) -> int:
        return len(self.forward.segments)

    @property
    def settled(self) -> bool:
        """Whether its gradient is here, or is known never to come."""
        return self.backward is not None or self.abandoned

    @property
    def kind(self) -> tuple[bool, bool, bool, bool]:
        """Training and evaluation never share a batch, nor do forwards with and without the adapter, or the replayed."""
        return self.forward.train, self.forward.grad, self.forward.adapter_on, self.replayed


@dataclass(slots=True)
class ForwardBatch:
    """Forwards of one kind that run together. ``number`` is what its backward will be known by; ``keep``: with their graph."""

    number: int
    members: list[Member]
    keep: bool = True

    @property
    def has_backward(self) -> bool:
        return self.members[0].forward.grad


@dataclass(slots=True)
class BackwardBatch:
    """Backwards that run together: of a whole forward batch whose graph is kept (``kept``), or of any forwards to be run again.
    With nobody left in it (``is_void``), there is only memory to be freed. ``last``: nothing that counts is likely to follow it
    in its step.
    """

    number: int
    members: list[Member]
    kept: bool = True
    last: bool = False

    @property
    def is_void(self) -> bool:
        return all(member.backward is None for member in self.members)
