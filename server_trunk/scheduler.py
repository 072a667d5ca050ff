"""Which batch the trunk runs next. Pure bookkeeping over pieces of work; no torch, no sockets, no clock of its own.

Ready backwards go first, since they free memory and let clients go on; then waiting forwards, as many of one kind as the policy
and the token budget take. They wait in the order of fairness, not of arrival: start-time fair queueing (Goyal, Vin, Cheng,
SIGCOMM 1996), so that a client that sends much cannot push back one that sends little.

The unit of a backward is the batch its forwards ran in, where the graph of that batch is kept: it is ready when each member's
gradient has arrived or is known never to arrive (its rows are then zero). Where only the hidden states are kept, each member is
ready by itself, and whatever is ready runs together.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from server_trunk.members import BackwardBatch, ForwardBatch, Member
from server_trunk.policies import POLICIES, Policy
from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import Backward, Forward

__all__ = ["MAX_UNDERWAY", "BackwardBatch", "Budget", "ForwardBatch", "Member", "Scheduler"]

#: Micro-batches of one session that wait or whose graph is kept. Far more than a step needs.
MAX_UNDERWAY = 4096

Allowed = Callable[[Member], bool]


@dataclass(slots=True)
class Budget:
    """Room in one batch: at most ``tokens``, pads included unless the trunk runs ``packed``; a single member always has room."""

    tokens: int
    packed: bool = False
    _first: Member | None = None
    _rows: int = 0
    _longest: int = 0
    _real: int = 0

    def take(self, member: Member) -> bool:
        """Whether ``member`` can run together with what was taken; if so, it is taken."""
        rows, longest = self._rows + member.segments, max(self._longest, member.longest)
        real = self._real + member.tokens
        if self._first is None:
            self._first = member
        elif member.kind != self._first.kind or (real if self.packed else rows * longest) > self.tokens:
            return False
        self._rows, self._longest, self._real = rows, longest, real
        return True


@dataclass(slots=True, eq=False)
class _Unit:
    """What one backward must wait for: all members of a batch with one graph, or a single member."""

    number: int
    members: list[Member]
    kept: bool
    runs: bool = True  # its forward has not ended
    awaited: int = field(init=False)  # members that have not settled, and that end; counted, as a batch may have thousands

    def __post_init__(self) -> None:
        self.awaited = sum(not member.settled for member in self.members) + self.runs


@dataclass(slots=True)
class Scheduler:
    """``batch_tokens``: most tokens of one batch (a larger micro-batch runs alone). ``policy``: a name of ``POLICIES``.

    ``graph_tokens``: tokens whose graphs are kept at a time over all clients, None: all of them; forwards beyond run without
    keeping theirs and once more for their backward. ``batch_wait``: seconds a batch that is not full waits for more, counted
    from its oldest member. ``packed``: the trunk has no pads.
    """

    batch_tokens: int
    policy: str = "client-batching"
    graph_tokens: int | None = None
    batch_wait: float = 0.0
    packed: bool = False
    kept_graph_tokens: int = 0
    due: float | None = None  # when a batch that waits for more runs without them
    _policy: Policy = field(init=False)
    _waiting: list[tuple[float, int, Member]] = field(default_factory=list)  # by start tag, then arrival
    _arrivals: int = 0
    _virtual: float = 0.0
    _finish: dict[str, float] = field(default_factory=dict)  # by client: the finish tag of its newest member
    _open: dict[str, dict[int, tuple[_Unit, Member]]] = field(default_factory=dict)  # by session and micro-batch
    _ready: dict[int, _Unit] = field(default_factory=dict)  # in the order in which they became ready
    _underway: dict[str, set[int]] = field(default_factory=dict)  # numbers of micro-batches, by session
    _kept: Counter[str] = field(default_factory=Counter)  # tokens under way, by session
    _next_number: int = 0

    def __post_init__(self) -> None:
        self._policy = POLICIES[self.policy]()

    # --- what comes in ----------------------------------------------------------------------------------------------------------

    def kept_tokens(self, session: str) -> int:
        """Tokens of this session that wait for their forward, or whose graph or hidden state is kept."""
        return self._kept[session]

    @property
    def waiting_tokens(self) -> int:
        """Tokens that wait for their forward."""
        return sum(member.tokens for _, _, member in self._waiting)

    def add_forward(
        self,
        session: str,
        forward: Forward,
        hidden: Any,
        *,
        client: str = "",
        ordinal: int = 0,
        replayed: bool = False,
        now: float = 0.0,
    ) -> None:
        """Raises RemoteProtocolError where the number is that of a micro-batch under way, or too many are."""
        underway = self._underway.setdefault(session, set())
        if forward.micro in underway:
            raise RemoteProtocolError(f"micro-batch {forward.micro} twice at the same time")
        if len(underway) >= MAX_UNDERWAY:
            raise RemoteProtocolError(f"more than {MAX_UNDERWAY} micro-batches under way")
        underway.add(forward.micro)
        member = Member(session, forward, hidden, client or session, ordinal, replayed, now)
        start = max(self._virtual, self._finish.get(member.client, 0.0))
        self._finish[member.client] = start + member.tokens
        self._arrivals += 1
        insort(self._waiting, (start, self._arrivals, member))
        self._kept[session] += member.tokens

    def add_backward(self, session: str, backward: Backward, gradient: Any, *, now: float = 0.0) -> Member:
        """Returns the micro-batch it belongs to. Raises RemoteProtocolError where no forward awaits this backward."""
        unit, member = self._open.get(session, {}).get(backward.micro, (None, None))
        if unit is None or member is None or member.settled or unit.runs:
            raise RemoteProtocolError(f"a backward for micro-batch {backward.micro}, whose graph is not kept")
        if backward.rows != member.tokens or backward.step != member.forward.step:
            raise RemoteProtocolError(f"a backward for micro-batch {backward.micro} of another size or step")
        member.backward, member.gradient, member.returned = backward, gradient, now
        self._settled(unit)
        return member

    def abandon(self, session: str, step: int | None = None) -> None:
        """No more backwards come from this session (for ``step``, or at all): missing rows become zero."""
        for unit, member in list(self._open.get(session, {}).values()):
            if not member.settled and step in (None, member.forward.step):
                member.abandoned = True
                self._settled(unit)

    def forget(self, session: str) -> None:
        """The session is gone: its waiting forwards go too, and nobody waits for its gradients."""
        self.withdraw(session)
        self.abandon(session)

    def withdraw(self, session: str, chosen: Allowed = lambda member: True) -> list[Member]:
        """Take back those of the session's waiting forwards that are ``chosen``; returns them."""
        gone = [member for _, _, member in self._waiting if member.session == session and chosen(member)]
        self._drop(gone)
        for member in gone:
            self._release(member)
        return gone

    def _settled(self, unit: _Unit) -> None:
        """One more member of it has."""
        unit.awaited -= 1
        if not unit.awaited:
            self._ready[unit.number] = unit

    # --- what is asked ----------------------------------------------------------------------------------------------------------

    def waits(self, session: str) -> bool:
        """Whether a forward of this session that will have a backward has not run yet."""
        if any(unit.runs for unit, _ in self._open.get(session, {}).values()):
            return True
        return any(member.session == session and member.forward.grad for _, _, member in self._waiting)

    def has_work(self, may_run: Allowed, now: float = 0.0, *, more_expected: bool = False) -> bool:
        """Whether :meth:`next` would return something. If not, ``due`` says when it will, should nothing come."""
        return bool(self._ready) or bool(self._choose(may_run, now, more_expected))

    # --- what runs --------------------------------------------------------------------------------------------------------------

    def next(self, may_run: Allowed, now: float = 0.0, *, more_expected: bool = False) -> ForwardBatch | BackwardBatch | None:
        """The next batch, or None where nothing runs now. ``may_run`` holds back forwards whose step is not open yet.

        ``more_expected``: further forwards of the open step will come, so a batch that is not full may wait ``batch_wait``.
        """
        if self._ready:
            return self._take_backwards()
        return self._take_forwards(may_run, now, more_expected)

    def _take_backwards(self) -> BackwardBatch:
        number, unit = next(iter(self._ready.items()))
        units = [self._ready.pop(number)]
        if not unit.kept:
            budget = Budget(self.batch_tokens, self.packed)
            budget.take(unit.members[0])
            more = [other for other in self._ready.values() if not other.kept and budget.take(other.members[0])]
            units += [self._ready.pop(other.number) for other in more]
        members = [member for each in units for member in each.members]
        for member in members:
            held = self._open[member.session]
            del held[member.forward.micro]
            if not held:
                del self._open[member.session]
            self._release(member)
        if unit.kept:
            self.kept_graph_tokens -= sum(member.tokens for member in members)
        return BackwardBatch(number, members, unit.kept)

    def _choose(self, may_run: Allowed, now: float, more_expected: bool) -> list[Member]:
        """The forwards to run next; empty where none may, or where they wait for more to come."""
        self.due = None
        waiting = [member for _, _, member in self._waiting if may_run(member)]
        if not waiting:
            return []
        budget = Budget(self.batch_tokens, self.packed)
        taken = self._policy.choose(waiting, budget.take, self._open)
        full = len(taken) < len(waiting) or sum(member.tokens for member in taken) >= self.batch_tokens
        if taken and self.batch_wait and more_expected and not full:
            due = min(member.arrived for member in taken) + self.batch_wait
            if now < due:
                self.due = due
                return []
        return taken

    def _take_forwards(self, may_run: Allowed, now: float, more_expected: bool) -> ForwardBatch | None:
        taken = self._choose(may_run, now, more_expected)
        if not taken:
            return None
        self._drop(taken)
        tokens = sum(member.tokens for member in taken)
        room = self.graph_tokens is None or self.kept_graph_tokens + tokens <= self.graph_tokens
        batch = ForwardBatch(self._number(), taken, keep=room and taken[0].forward.grad)
        if batch.has_backward:
            self._open_units([_Unit(batch.number, taken, True)] if room else self._single(taken))
        else:
            for member in taken:
                self._release(member)
        return batch

    def ran(self, batch: ForwardBatch) -> None:
        """A batch that has a backward has run: from now on that may."""
        for member in batch.members:
            unit, _ = self._open[member.session][member.forward.micro]
            if unit.runs:
                unit.runs = False
                self._settled(unit)

    def split(self, batch: ForwardBatch) -> list[ForwardBatch]:
        """The members of a batch that could not run together, each in a batch of its own."""
        apart = [ForwardBatch(self._number(), [member], batch.keep) for member in batch.members]
        if batch.has_backward:
            self._close_units(batch)
            self._open_units([_Unit(one.number, one.members, one.keep) for one in apart])
        return apart

    def unkeep(self, batch: ForwardBatch) -> None:
        """The device had no room for the batch's graph: its members' forwards will run again for their backwards."""
        batch.keep = False
        self._close_units(batch)
        self._open_units(self._single(batch.members))

    # --- bookkeeping ------------------------------------------------------------------------------------------------------------

    def _number(self) -> int:
        self._next_number += 1
        return self._next_number - 1

    def _single(self, members: list[Member]) -> list[_Unit]:
        return [_Unit(self._number(), [member], False) for member in members]

    def _open_units(self, units: list[_Unit]) -> None:
        for unit in units:
            for member in unit.members:
                member.kept = unit.kept
                self._open.setdefault(member.session, {})[member.forward.micro] = (unit, member)
                if unit.kept:
                    self.kept_graph_tokens += member.tokens

    def _close_units(self, batch: ForwardBatch) -> None:
        for member in batch.members:
            unit, _ = self._open[member.session].pop(member.forward.micro)
            self._ready.pop(unit.number, None)
            if unit.kept:
                self.kept_graph_tokens -= member.tokens

    def _drop(self, members: list[Member]) -> None:
        """Take members off the queue; the virtual time moves on to the last of them."""
        chosen = {id(member) for member in members}
        for start, _, member in self._waiting:
            if id(member) in chosen:
                self._virtual = max(self._virtual, start)
        self._waiting = [entry for entry in self._waiting if id(entry[2]) not in chosen]
        if not self._waiting:
            self._virtual = 0.0
            self._finish.clear()

    def _release(self, member: Member) -> None:
        underway = self._underway[member.session]
        underway.discard(member.forward.micro)
        if not underway:
            del self._underway[member.session]
        self._kept[member.session] -= member.tokens
        if not self._kept[member.session]:
            del self._kept[member.session]
