"""What a step is made of: one part a participant, and the ledger of what counted. Pure bookkeeping."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import AskNorm, StepDone

__all__ = ["LATE", "LOST", "PAUSED", "Ledger", "Part", "check_asked", "check_done", "earliest"]

#: Why a part is not whole, as the log says it.
LATE, LOST, PAUSED = "late", "lost", "paused"


@dataclass(slots=True)
class Part:
    """What one client has contributed to one step. ``targets`` are the tokens whose gradient counted, of ``micro_batches``.

    ``session`` holds the part now; the counts of its messages begin anew where another session takes over. ``step``: as that
    session numbers it. ``counted``: ordinals of the micro-batches whose gradient is in the sum, or has arrived and will be.
    """

    session: str
    client: str = ""
    step: int = 0
    targets: int = 0
    micro_batches: int = 0
    taken: int = 0  # forwards that have arrived
    forwards: int = 0  # forwards that have run
    arrived: int = 0  # gradients that have arrived
    backwards: int = 0  # gradients that have run
    unrun: int = 0  # gradients that are here, of whichever session, and have not run
    counted: set[int] = field(default_factory=set)
    replays: dict[str, frozenset[int]] = field(default_factory=dict)  # by session that took over: what had counted by then
    done: StepDone | None = None
    asked: AskNorm | None = None  # its session wants to know the norm of the step's gradient
    dropped: bool = False
    why: str = ""
    withdrawn: bool = False  # its client has to enrol again before it takes part in another step
    lost_at: float | None = None  # the part is held for its client's return
    awaited: float | None = None  # since when others wait for it
    staleness: int = 0

    @property
    def all_arrived(self) -> bool:
        """Whether every gradient that was announced is here."""
        announced = self.done or self.asked
        return announced is not None and self.arrived >= announced.backwards

    @property
    def has_asked_in_time(self) -> bool:
        """Whether every gradient that its session's question is about has run."""
        return self.asked is not None and self.backwards >= self.asked.backwards and not self.unrun

    @property
    def will_be_whole(self) -> bool:
        """Whether everything that was announced is here, and will have run before long."""
        return self.done is not None and self.all_arrived and self.forwards >= self.done.forwards

    @property
    def finished(self) -> bool:
        """Whether the step need not wait for this part."""
        if self.dropped:
            return True
        whole = self.done is not None and self.forwards >= self.done.forwards and self.backwards >= self.done.backwards
        return whole and self.lost_at is None

    @property
    def pending(self) -> bool:
        """Whether something of it is here that has not run: then the server's work is awaited, not the client's."""
        return self.taken > self.forwards or self.unrun > 0

    def forward_ran(self, session: str) -> None:
        if session == self.session:
            self.forwards += 1

    def backward_arrived(self, ordinal: int) -> None:
        self.arrived += 1
        self.unrun += 1
        self.counted.add(ordinal)

    def backward_ran(self, session: str, ordinal: int, targets: int) -> None:
        """Its gradient is in the sum, also when the session vanished meanwhile; or it was there before (a replay)."""
        self.unrun -= 1
        if session == self.session:
            self.backwards += 1
        if ordinal not in self.replays.get(session, ()):
            self.targets += targets
            self.micro_batches += 1

    def backward_failed(self, session: str, ordinal: int) -> None:
        """It will not be in the sum."""
        self.unrun -= 1
        if session == self.session:
            self.arrived -= 1  # so that the part is not taken for one that will be whole
        if ordinal not in self.replays.get(session, ()):
            self.counted.discard(ordinal)

    def hold(self, now: float) -> None:
        """Its session is lost, and the step waits for another of the same client."""
        self.lost_at, self.done, self.asked = now, None, None

    def wait(self, now: float, awaited: bool) -> None:
        """Others wait for this part, or do not."""
        if not awaited:
            self.awaited = None
        elif self.awaited is None:
            self.awaited = now

    def is_overdue(self, now: float, deadline: float) -> bool:
        since = self.awaited if self.lost_at is None else self.lost_at
        return since is not None and now - since >= deadline

    def take_over(self, session: str) -> None:
        """Another session begins the part anew; what has counted stays."""
        self.session, self.lost_at, self.awaited = session, None, None
        self.replays[session] = frozenset(self.counted)
        self.taken = self.forwards = self.arrived = self.backwards = 0


@dataclass(slots=True)
class Ledger:
    """What one optimizer step was made of. ``parts``: by the session that began them. ``targets`` and ``participants`` include
    those ``elsewhere``, on other replicas. ``met``: where replicas have met, what counted on all since the last time, by client.
    """

    step: int
    parts: dict[str, Part] = field(default_factory=dict)
    ends_parts: bool = True  # the optimizer step is the end of each part too
    targets_elsewhere: int = 0
    participants_elsewhere: int = 0
    met: dict[str, int] | None = None

    @property
    def targets(self) -> int:
        return self.targets_here + self.targets_elsewhere

    @property
    def targets_here(self) -> int:
        return sum(part.targets for part in self.parts.values())

    @property
    def participants(self) -> int:
        return len(self.parts) + self.participants_elsewhere

    @property
    def targets_by_client(self) -> dict[str, int]:
        total: Counter[str] = Counter()
        for part in self.parts.values():
            total[part.client] += part.targets
        return dict(total)


def check_asked(part: Part, message: AskNorm) -> None:
    """Raises RemoteProtocolError where a question for the norm contradicts what was sent."""
    if part.done is not None or part.asked is not None:
        raise RemoteProtocolError(f"the norm of step {message.step} is asked for twice, or after its end")
    if part.arrived > message.backwards:
        raise RemoteProtocolError(f"the norm of step {message.step} is asked for with fewer gradients than were sent")


def check_done(part: Part, message: StepDone) -> None:
    """Raises RemoteProtocolError where the end of a part contradicts what was sent."""
    if part.done is not None:
        raise RemoteProtocolError(f"the end of step {message.step} twice")
    if part.taken > message.forwards or part.arrived > message.backwards:
        raise RemoteProtocolError(f"the end of step {message.step} declares less than was sent")
    if message.backwards > message.forwards:
        raise RemoteProtocolError(f"the end of step {message.step} declares more backwards than forwards")


def earliest(parts: Iterable[Part], now: float, deadline: float) -> float | None:
    """Seconds until the first of these parts is overdue."""
    times = [part.awaited if part.lost_at is None else part.lost_at for part in parts]
    return min((max(0.0, since + deadline - now) for since in times if since is not None), default=None)
