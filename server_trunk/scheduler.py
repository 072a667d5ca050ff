"""Which batch the trunk runs next. Pure bookkeeping over pieces of work; no torch, no sockets, no clock.

Ready backwards go first, since they free memory and let clients go on; then waiting forwards, oldest first, as many of one kind
as the token budget takes. The unit of a backward is the batch its forwards ran in: it is ready when each member's gradient has
arrived or is known never to arrive (its rows are then zero).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import Backward, Forward

__all__ = ["BackwardBatch", "ForwardBatch", "Member", "Scheduler"]

#: Micro-batches of one session that wait or whose graph is kept. Far more than a step needs; the loop walks them often.
MAX_UNDERWAY = 4096


@dataclass(slots=True, eq=False)
class Member:
    """One micro-batch of one session on its way through the trunk. ``hidden`` is ``(tokens, hidden)``, as is ``gradient``."""

    session: str
    forward: Forward
    hidden: Any
    backward: Backward | None = None
    gradient: Any = None
    abandoned: bool = False
    spoilt: bool = False  # its gradient was not finite and counted as zero
    longest: int = field(init=False)  # of its segments, in tokens

    def __post_init__(self) -> None:
        self.longest = max(length for length, _ in self.forward.segments)

    @property
    def tokens(self) -> int:
        return self.forward.rows

    @property
    def segments(self) -> int:
        return len(self.forward.segments)

    @property
    def settled(self) -> bool:
        return self.backward is not None or self.abandoned


@dataclass(slots=True)
class ForwardBatch:
    """Forwards of one kind that run together. ``number`` is what its backward will be known by."""

    number: int
    members: list[Member]

    @property
    def keeps_graph(self) -> bool:
        return self.members[0].forward.grad


@dataclass(slots=True)
class BackwardBatch:
    """The backward of a whole forward batch. With nobody left in it (``is_void``), the graph is only to be freed."""

    number: int
    members: list[Member]

    @property
    def is_void(self) -> bool:
        return all(member.backward is None for member in self.members)


@dataclass(slots=True)
class Scheduler:
    """``batch_tokens``: most tokens of one forward batch, pads included (a larger micro-batch runs alone)."""

    batch_tokens: int
    _waiting: deque[Member] = field(default_factory=deque)
    _open: dict[int, list[Member]] = field(default_factory=dict)
    _by_micro: dict[tuple[str, int], tuple[int, Member]] = field(default_factory=dict)
    _underway: dict[str, set[int]] = field(default_factory=dict)  # numbers of micro-batches, by session
    _kept: dict[str, int] = field(default_factory=dict)
    _next_number: int = 0

    def kept_tokens(self, session: str) -> int:
        """Tokens of this session that wait for their forward, or whose graph is kept."""
        return self._kept.get(session, 0)

    def add_forward(self, session: str, forward: Forward, hidden: Any) -> None:
        """Raises RemoteProtocolError where the number is that of a micro-batch under way, or too many are."""
        underway = self._underway.setdefault(session, set())
        if forward.micro in underway:
            raise RemoteProtocolError(f"micro-batch {forward.micro} twice at the same time")
        if len(underway) >= MAX_UNDERWAY:
            raise RemoteProtocolError(f"more than {MAX_UNDERWAY} micro-batches under way")
        underway.add(forward.micro)
        member = Member(session, forward, hidden)
        self._waiting.append(member)
        self._count(member, +1)

    def add_backward(self, session: str, backward: Backward, gradient: Any) -> None:
        """Raises RemoteProtocolError where no forward awaits this backward."""
        _, member = self._by_micro.get((session, backward.micro), (0, None))
        if member is None or member.settled:
            raise RemoteProtocolError(f"a backward for micro-batch {backward.micro}, whose graph is not kept")
        if backward.rows != member.tokens or backward.step != member.forward.step:
            raise RemoteProtocolError(f"a backward for micro-batch {backward.micro} of another size or step")
        member.backward, member.gradient = backward, gradient

    def waits(self, session: str) -> bool:
        """Whether a forward of this session with a graph to keep has not run yet."""
        return any(member.session == session and member.forward.grad for member in self._waiting)

    def open_micros(self, session: str, step: int) -> int:
        """How many of the session's backwards for ``step`` have arrived and not yet run."""
        return sum(
            1
            for (owner, _), (_, member) in self._by_micro.items()
            if owner == session and member.forward.step == step and member.backward is not None
        )

    def abandon(self, session: str, step: int | None = None) -> None:
        """No more backwards come from this session (for ``step``, or at all): missing rows become zero."""
        for (owner, _), (_, member) in self._by_micro.items():
            if owner == session and member.backward is None and step in (None, member.forward.step):
                member.abandoned = True

    def forget(self, session: str) -> None:
        """The session is gone: its waiting forwards go too, and nobody waits for its gradients."""
        gone = [member for member in self._waiting if member.session == session]
        self._waiting = deque(member for member in self._waiting if member.session != session)
        for member in gone:
            self._release(member)
        self.abandon(session)

    def runs_later(self, step: int) -> bool:
        """Whether a gradient of ``step`` has arrived that has not run yet: until it has, the step's sum is not whole."""
        return any(member.backward is not None and member.forward.step == step for _, member in self._by_micro.values())

    def split(self, batch: ForwardBatch) -> list[ForwardBatch]:
        """The members of a batch that could not run together, each in a batch of its own."""
        self._open.pop(batch.number, None)
        return [self._batch([member]) for member in batch.members]

    def has_work(self, may_run: Callable[[Member], bool]) -> bool:
        """Whether :meth:`next` would return something."""
        return any(all(m.settled for m in members) for members in self._open.values()) or any(
            may_run(member) for member in self._waiting
        )

    def next(self, may_run: Callable[[Member], bool]) -> ForwardBatch | BackwardBatch | None:
        """The next batch, or None where nothing can run now. ``may_run`` holds back forwards whose step is not open yet."""
        for number, members in self._open.items():
            if all(member.settled for member in members):
                return self._take_backward(number)
        return self._take_forwards(may_run)

    def _take_backward(self, number: int) -> BackwardBatch:
        members = self._open.pop(number)
        for member in members:
            del self._by_micro[member.session, member.forward.micro]
            self._release(member)
        return BackwardBatch(number, members)

    def _take_forwards(self, may_run: Callable[[Member], bool]) -> ForwardBatch | None:
        taken: list[Member] = []
        rows = longest = 0
        for member in self._waiting:
            if not may_run(member):
                continue
            together = (rows + member.segments) * max(longest, member.longest)
            if taken and (_kind(member) != _kind(taken[0]) or together > self.batch_tokens):
                continue
            taken.append(member)
            rows, longest = rows + member.segments, max(longest, member.longest)
        if not taken:
            return None
        chosen = {id(member) for member in taken}
        self._waiting = deque(member for member in self._waiting if id(member) not in chosen)
        batch = self._batch(taken)
        if not batch.keeps_graph:
            for member in taken:
                self._release(member)
        return batch

    def _batch(self, members: list[Member]) -> ForwardBatch:
        batch = ForwardBatch(self._next_number, members)
        self._next_number += 1
        if batch.keeps_graph:
            self._open[batch.number] = members
            for member in members:
                self._by_micro[member.session, member.forward.micro] = (batch.number, member)
        return batch

    def _release(self, member: Member) -> None:
        underway = self._underway[member.session]
        underway.discard(member.forward.micro)
        if not underway:
            del self._underway[member.session]
        self._count(member, -1)

    def _count(self, member: Member, sign: int) -> None:
        left = self._kept.get(member.session, 0) + sign * member.tokens
        if left:
            self._kept[member.session] = left
        else:
            self._kept.pop(member.session, None)


def _kind(member: Member) -> tuple[bool, bool, bool]:
    """Training and evaluation never share a batch, nor do forwards with and without the adapter."""
    return member.forward.train, member.forward.grad, member.forward.adapter_on
