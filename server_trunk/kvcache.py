"""The sequences that clients decode: which are kept, how many tokens they may be, which go first. No arithmetic but copies.

A forward that decodes names, for each of its segments, the sequence that it follows and the one it makes. Its room is reserved as
a whole before it begins, so nothing that has begun ever waits for room. What is in nobody's way is kept; else whatever has been
used least recently goes, the client's own first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from splitfl.errors import RemoteProtocolError
from splitfl.parts.cached_attention import KeptSequence
from splitfl.protocol.data import NO_PARENT
from splitfl.protocol.messages import Forward

__all__ = ["CacheBook", "CacheFull", "Evicted"]

#: A session's number of sequences: what it keeps in mind beside tokens is bounded too.
MAX_SEQUENCES = 8192


class Evicted(Exception):
    """What a forward was to follow is kept no longer."""


class CacheFull(Exception):
    """A forward by itself needs more room than a client has; says so in a sentence."""


@dataclass(slots=True, eq=False)
class _Held:
    """One sequence of a session. ``tokens``: the room that is reserved for it; ``used``: when it was, counted in forwards."""

    kept: KeptSequence
    client: str
    tokens: int
    used: int
    busy: bool = False  # a forward is at work on it
    unwanted: bool = False  # released meanwhile


@dataclass(slots=True)
class CacheBook:
    """``tokens``: kept over all clients; ``client_tokens``: for one client, over its sessions."""

    tokens: int
    client_tokens: int
    _sessions: dict[str, dict[int, _Held]] = field(default_factory=dict)
    _expected: dict[str, set[int]] = field(default_factory=dict)  # named by forwards that wait or run
    _clock: int = 0

    @property
    def held_tokens(self) -> int:
        """Tokens whose keys and values are kept, or have room reserved."""
        return sum(held.tokens for held in self._all())

    def held_by(self, client: str) -> int:
        return sum(held.tokens for held in self._all() if held.client == client)

    def expect(self, session: str, forward: Forward) -> None:
        """A forward has come, to begin later.

        Raises:
            RemoteProtocolError: it names a sequence that another forward of the session is about.
        """
        named = _named(forward)
        expected = self._expected.setdefault(session, set())
        both = named & expected
        if both:
            raise RemoteProtocolError(f"sequence {min(both)} in two forwards at the same time")
        if len(self._sessions.get(session, {}).keys() | named | expected) > MAX_SEQUENCES:
            raise RemoteProtocolError(f"more than {MAX_SEQUENCES} sequences")
        expected |= named

    def begin(self, session: str, client: str, forward: Forward) -> list[KeptSequence] | None:
        """Reserve room; returns what each segment follows, to be written behind. None: there is no room until others are done.

        Raises:
            Evicted: what it follows is gone. CacheFull: it is too long for any client.
        """
        own = self._sessions.get(session, {})
        wanted = {number: kept + length for (length, _), (number, (_, kept)) in _pairs(forward)}
        needed = sum(wanted.values())
        if needed > self.client_tokens:
            raise CacheFull(
                f"{len(wanted)} sequences of {needed} tokens together, where a client has room for the keys and values of "
                f"{self.client_tokens}: fewer or shorter sequences, fewer beams, generate(use_cache=False), or ask the operator "
                "to raise client_cache_tokens"
            )
        for _, (number, (parent, kept)) in _pairs(forward):
            if parent != NO_PARENT and (parent not in own or own[parent].kept.length < kept):
                raise Evicted(f"sequence {parent} is kept no longer, which sequence {number} was to follow")
        parents = {parent for _, (_, (parent, _)) in _pairs(forward)}
        spared = {id(own[number]) for number in parents | wanted.keys() if number in own}
        replaced = sum(own[number].tokens for number in wanted if number in own)
        if not self._make_room(client, needed - replaced, spared):
            if any(held.busy for held in self._all()):
                return None
            raise Evicted("what is to be followed, and what is to follow it, have no room side by side")
        return self._fork(session, client, forward, wanted)

    def done(self, session: str, forward: Forward) -> None:
        """It has run, and all that it wrote is committed."""
        own = self._sessions.get(session, {})
        self._clock += 1
        for number, _ in forward.sequences:
            held = own[number]
            held.busy, held.used = False, self._clock
            if held.unwanted:
                del own[number]
        self.give_up(session, forward)

    def give_up(self, session: str, forward: Forward) -> None:
        """It will not run, or not once more: its sequences may be named again. Those that it was at work on are dropped."""
        own = self._sessions.get(session, {})
        for number, _ in forward.sequences:
            if number in own and own[number].busy:
                del own[number]
        expected = self._expected.get(session, set())
        expected -= _named(forward)
        if not expected:
            self._expected.pop(session, None)
        if not own:
            self._sessions.pop(session, None)

    def release(self, session: str, numbers: Sequence[int]) -> None:
        """The client has no more use for these."""
        own = self._sessions.get(session, {})
        for number in numbers:
            held = own.get(number)
            if held is not None and held.busy:
                held.unwanted = True
            elif held is not None:
                del own[number]
        if not own:
            self._sessions.pop(session, None)

    def forget(self, session: str) -> None:
        """The session is gone."""
        self._sessions.pop(session, None)
        self._expected.pop(session, None)

    def evict_idle(self) -> int:
        """Drop all that no forward is at work on; returns how many tokens. For a device that is out of memory."""
        idle = [held for held in self._all() if not held.busy]
        for held in idle:
            self._evict(held)
        return sum(held.tokens for held in idle)

    # --- room -------------------------------------------------------------------------------------------------------------------

    def _all(self) -> Iterable[_Held]:
        return [held for own in self._sessions.values() for held in own.values()]

    def _make_room(self, client: str, more: int, spared: set[int]) -> bool:
        """Evict until so many ``more`` tokens fit; False, and nothing evicted, where they cannot."""
        over, over_own = self.held_tokens + more - self.tokens, self.held_by(client) + more - self.client_tokens
        if over <= 0 and over_own <= 0:
            return True
        gone: list[_Held] = []
        idle = sorted((held for held in self._all() if not held.busy and id(held) not in spared), key=lambda held: held.used)
        # Its own first: a client that decodes much pushes itself out before others.
        for held in sorted(idle, key=lambda held: held.client != client):
            if over <= 0 and over_own <= 0:
                break
            if held.client == client or over > 0:
                gone.append(held)
                over -= held.tokens
                over_own -= held.tokens if held.client == client else 0
        if over > 0 or over_own > 0:
            return False
        for held in gone:
            self._evict(held)
        return True

    def _evict(self, held: _Held) -> None:
        for session, own in list(self._sessions.items()):
            for number in [number for number, each in own.items() if each is held]:
                del own[number]
            if not own:
                del self._sessions[session]

    def _fork(self, session: str, client: str, forward: Forward, wanted: dict[int, int]) -> list[KeptSequence]:
        """Give each new sequence what it follows: its parent's memory, where nobody else needs that, else a copy."""
        own = self._sessions.setdefault(session, {})
        before = {number: held.kept for number, held in own.items()}
        heirs: dict[int, int] = {}  # by parent that is overwritten: who takes its memory
        for number, (parent, _) in forward.sequences:
            if parent in wanted and (parent not in heirs or parent == number):
                heirs[parent] = number
        following: dict[int, KeptSequence] = {}
        for number, (parent, kept) in forward.sequences:
            if parent == NO_PARENT:
                following[number] = KeptSequence()
            elif heirs.get(parent) != number:
                following[number] = before[parent].copy(kept)
        for number, (parent, kept) in forward.sequences:  # once nobody copies from it any more
            if number not in following:
                following[number] = before[parent]
                following[number].truncate(kept)
        for number, tokens in wanted.items():
            own[number] = _Held(following[number], client, tokens, self._clock, busy=True)
        return [following[number] for number, _ in forward.sequences]


def _pairs(forward: Forward) -> Iterable[tuple[tuple[int, int], tuple[int, tuple[int, int]]]]:
    return zip(forward.segments, forward.sequences, strict=True)


def _named(forward: Forward) -> set[int]:
    """The sequences that a forward reads or writes."""
    return {number for number, _ in forward.sequences} | {parent for _, (parent, _) in forward.sequences if parent != NO_PARENT}
