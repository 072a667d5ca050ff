"""Rounds: after every ``round_steps`` closed steps the clients' ends are averaged. Pure bookkeeping; no torch, sockets or clock.

The **members** of a round are the sessions that ended their part of its last step and are still there. Each counts by its target
tokens that counted since the round before (FedAvg, McMahan et al., arXiv 1602.05629). A member that vanishes before its ends are
whole is gone on without; so is one that others, whose ends are whole, have waited for as long as the deadline allows. Under
``on_loss = "wait"`` one that vanishes is waited for, if it was to take part in the next step too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping

from server_trunk.ledger import Ledger

__all__ = ["Rounds"]


class Rounds:
    """Every method is called from the trunk's thread; ``now`` is its clock, seconds."""

    def __init__(self, *, steps: int, deadline: float = 0.0, on_loss: str = "drop", alone: bool = True) -> None:
        """``steps``: closed steps a round has. ``deadline``: seconds for which others wait for a member, or for the return of a
        lost one (0: no limit). ``alone``: whether nobody waits on another replica.
        """
        self._steps, self._deadline, self._alone, self._waits = steps, deadline, alone, on_loss == "wait"
        self._targets: Counter[str] = Counter()  # since the last round, by session
        self._clients: dict[str, str] = {}  # of those sessions
        self._carried: Counter[str] = Counter()  # the same, of sessions that are gone, by client
        self._unmet: Counter[str] = Counter()  # here, since replicas have met, by client
        self._go_on: set[str] = set()  # sessions whose ends hold what their client did in one that is gone
        self._weights: dict[str, int] = {}  # of those asked for their ends, still there and in time
        self._awaited: set[str] = set()
        self._present: dict[str, str] = {}  # clients by session that were there when the round opened
        self._stay: set[str] = set()  # those of them that are to take part in the next step too
        self._lost: dict[str, tuple[str, int, float]] = {}  # by lost session: its client, that is waited for, weight, since when
        self._since: float | None = None  # since when others wait: the first was whole
        self.number = -1  # the open round, or the newest
        self.is_open = False

    def joins(self, session: str, *, goes_on: bool) -> None:
        """A session takes part for the first time. ``goes_on``: with the ends that its client trained before, in another."""
        if goes_on:
            self._go_on.add(session)

    def count(self, ledger: Ledger, here: Container[str]) -> None:
        """A step has closed; ``here`` are the sessions that are there."""
        for part in ledger.parts.values():
            if part.session in here:
                self._targets[part.session] += part.targets
                self._clients[part.session] = part.client
            else:
                self._carried[part.client] += part.targets
            self._unmet[part.client] += part.targets
        if ledger.met is not None:
            # What clients of other replicas have counted is known too: they may come here with it.
            self._carried += Counter(ledger.met) - self._unmet
            self._unmet.clear()

    def ends_with(self, step: int) -> bool:
        """Whether ``step`` is the last of a round."""
        return (step + 1) % self._steps == 0

    def open(self, step: int, present: Mapping[str, str], now: float = 0.0, *, stay: Iterable[str] = ()) -> dict[str, int]:
        """Open the round that ends with ``step``; returns the weights of those of ``present``, clients by session, that are to
        send their ends. ``stay``: those that are to take part in the next step too.
        """
        self._present, self._stay, self._lost = dict(present), set(stay), {}
        self.number, self.is_open, self._since = (step + 1) // self._steps - 1, True, None if self._alone else now
        for session in self._go_on & present.keys():
            self._targets[session] += self._carried.pop(present[session], 0)
        self._weights = {session: self._targets[session] for session in present if self._targets[session] > 0}
        self._awaited = set(self._weights)
        self.forget_targets()
        return dict(self._weights)

    def forget_targets(self) -> None:
        """What counted so far is in an average."""
        self._targets.clear()
        self._clients.clear()
        self._carried.clear()
        self._go_on.clear()

    @property
    def targets(self) -> dict[str, int]:
        """What counted since the last round, by client."""
        total = self._carried.copy()
        for session, targets in self._targets.items():
            total[self._clients[session]] += targets
        return dict(total)

    @targets.setter
    def targets(self, targets: Mapping[str, int]) -> None:
        """The run is taken up again: no session has counted anything, and who goes on has what its client had."""
        self._targets.clear()
        self._clients.clear()
        self._carried = Counter(targets)

    def awaits(self, session: str, number: int) -> bool:
        """Whether a part of this session's ends for round ``number`` is of use."""
        return self.is_open and number == self.number and session in self._awaited

    def whole(self, session: str, now: float) -> None:
        """All of this session's ends are here."""
        if session in self._awaited:
            self._awaited.discard(session)
            self._since = now if self._since is None else self._since

    def withdraw(self, session: str) -> None:
        """The session takes no part in the next step: should it be lost, nobody waits for its client."""
        self._stay.discard(session)

    def lose(self, session: str, now: float | None = None) -> None:
        """The session is gone, ``now``, or late (None). Ends that are whole count."""
        if session in self._clients:
            self._carried[self._clients.pop(session)] += self._targets.pop(session)
        self._go_on.discard(session)
        if session in self._awaited:
            self._awaited.discard(session)
            weight = self._weights.pop(session)
            if self._waits and now is not None and session in self._stay:
                self._lost[session] = self._present[session], weight, now

    def waits_for(self, client: str) -> bool:
        """Whether a client that was lost is waited for."""
        return self.is_open and any(each == client for each, _, _ in self._lost.values())

    def returns(self, session: str, client: str, now: float = 0.0, *, holds: bool, replaces: str = "") -> int:
        """A client that was waited for is back in another session. ``holds``: as it stood at the end of the round's last step.
        ``replaces``: the lost session whose ends these are, where the client says so; else they are its oldest's. Returns its
        weight if it is to send its ends, else 0: then it is gone on without.
        """
        lost = [each for each, (name, _, _) in self._lost.items() if name == client]
        _, weight, _ = self._lost.pop(replaces if replaces in lost else lost[0])
        if not holds:
            return 0
        self._weights[session] = weight
        self._awaited.add(session)
        self._present[session] = client
        self._stay.add(session)
        self._since = None if self._since is None else now  # it has yet to begin
        return weight

    def give_up(self, now: float) -> list[str]:
        """The clients whose return others have waited for longer than the deadline allows: they are gone on without."""
        late = [each for each, (_, _, since) in self._lost.items() if self._deadline and now - since >= self._deadline]
        return [self._lost.pop(each)[0] for each in late]

    def exclude(self, session: str) -> None:
        """Ends that are whole, but of no use."""
        self._awaited.discard(session)
        self._weights.pop(session, None)

    def overdue(self, now: float) -> list[str]:
        """The members that others have waited for longer than the deadline allows."""
        if not self._deadline or self._since is None or now - self._since < self._deadline:
            return []
        return sorted(self._awaited)

    def wake(self, now: float) -> float | None:
        """Seconds until :meth:`overdue` is worth asking again though nothing has happened; None: no need."""
        if not self._deadline:
            return None
        times = [since for _, _, since in self._lost.values()]
        times += [self._since] if self._since is not None and self._awaited else []
        return max(0.0, min(times) + self._deadline - now) if times else None

    @property
    def is_gathered(self) -> bool:
        """Whether nobody's ends are awaited."""
        return self.is_open and not self._awaited and not self._lost

    @property
    def weights(self) -> dict[str, int]:
        """The weight of each member that has not been gone on without."""
        return dict(self._weights)

    def close(self) -> None:
        self.is_open = False
