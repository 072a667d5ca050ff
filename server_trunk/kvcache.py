"""The sequences that clients decode: which are kept, how many tokens they may be, which go first. No arithmetic but copies.

A forward that decodes names, for each of its segments, the sequence that it follows and the one it makes. Its room is reserved as
a whole before it begins, so nothing that has begun ever waits for room. What is in nobody's way is kept; else whatever has been
used least recently goes, the client's own first. What is counted is real: no sequence holds memory for more than a quarter more
tokens than it has.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from splitfl.errors import RemoteProtocolError
from splitfl.parts.cached_attention import KeptSequence, room_for
from splitfl.protocol.data import NO_PARENT
from splitfl.protocol.messages import Forward

__all__ = ["CacheBook", "CacheFull", "Evicted", "named"]

#: Sequences of a session, and of a client over its sessions: what is kept in mind of each beside its tokens is bounded too.
MAX_SEQUENCES = 8192


class Evicted(Exception):
    """What a forward was to follow is kept no longer."""


class CacheFull(Exception):
    """A forward by itself needs more room than a client has; says so in a sentence."""


@dataclass(slots=True, eq=False)
class _Held:
    """One sequence of a session, with room for ``tokens``. A forward is at work on one that is not idle."""

    kept: KeptSequence
    session: str
    number: int
    client: str
    tokens: int
    unwanted: bool = False  # released meanwhile


@dataclass(slots=True)
class _Account:
    """What one client has, over its sessions. ``idle``: the least recently used first."""

    tokens: int = 0
    sequences: int = 0
    idle: dict[_Held, None] = field(default_factory=dict)


@dataclass(slots=True)
class CacheBook:
    """``tokens``: kept over all clients; ``client_tokens``: for one client, over its sessions. ``make``: an empty sequence."""

    tokens: int
    client_tokens: int
    make: Callable[[], KeptSequence] = KeptSequence
    _sessions: dict[str, dict[int, _Held]] = field(default_factory=dict)
    _accounts: dict[str, _Account] = field(default_factory=dict)
    _idle: dict[_Held, None] = field(default_factory=dict)  # of all clients, the least recently used first
    _expected: dict[str, set[int]] = field(default_factory=dict)  # named by forwards that wait or run

    @property
    def held_tokens(self) -> int:
        """Tokens whose keys and values are kept, or have room reserved."""
        return sum(account.tokens for account in self._accounts.values())

    def held_by(self, client: str) -> int:
        return self._accounts[client].tokens if client in self._accounts else 0

    def expect(self, session: str, forward: Forward) -> set[int]:
        """A forward has come, to begin later. Returns the sequences that it reads or writes.

        Raises:
            RemoteProtocolError: it names a sequence that another forward of the session is about.
        """
        about = named(forward)
        expected = self._expected.setdefault(session, set())
        both = about & expected
        if both:
            raise RemoteProtocolError(f"sequence {min(both)} in two forwards at the same time")
        own = self._sessions.get(session, {})
        if len(own) + sum(number not in own for number in itertools.chain(about, expected)) > MAX_SEQUENCES:
            raise RemoteProtocolError(f"more than {MAX_SEQUENCES} sequences")
        expected |= about
        return about

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
        spared = {own[number] for number in parents | wanted.keys() if number in own}
        replaced = [own[number] for number in wanted if number in own]
        more = needed - sum(held.tokens for held in replaced)
        if not self._make_room(client, more, len(wanted) - len(replaced), spared):
            if any(account.sequences > len(account.idle) for account in self._accounts.values()):
                return None
            raise Evicted("what is to be followed, and what is to follow it, have no room side by side")
        before = {number: own[number].kept for number in parents if number != NO_PARENT}
        following = _fork(before, forward, wanted, self.make)
        for held in replaced:
            self._remove(held)
        for number, tokens in wanted.items():
            self._add(_Held(following[number], session, number, client, tokens))
        return [following[number] for number, _ in forward.sequences]

    def done(self, session: str, forward: Forward) -> None:
        """It has run, and all that it wrote is committed."""
        own = self._sessions.get(session, {})
        for held in [own[number] for number, _ in forward.sequences]:
            if held.unwanted:
                self._remove(held)
            else:
                self._idle[held] = self._accounts[held.client].idle[held] = None
        self.give_up(session, forward)

    def give_up(self, session: str, forward: Forward) -> None:
        """It will not run, or not once more: its sequences may be named again. Those that it was at work on are dropped."""
        own = self._sessions.get(session, {})
        for held in [own[number] for number, _ in forward.sequences if number in own]:
            if held not in self._idle:
                self._remove(held)
        expected = self._expected.get(session, set())
        expected -= named(forward)
        if not expected:
            self._expected.pop(session, None)

    def release(self, session: str, numbers: Sequence[int]) -> None:
        """The client has no more use for these."""
        own = self._sessions.get(session, {})
        for held in [own[number] for number in set(numbers) if number in own]:
            if held in self._idle:
                self._remove(held)
            else:
                held.unwanted = True

    def forget(self, session: str) -> None:
        """The session is gone."""
        for held in list(self._sessions.get(session, {}).values()):
            self._remove(held)
        self._expected.pop(session, None)

    def evict_idle(self) -> int:
        """Drop all that no forward is at work on; returns how many tokens. For a device that is out of memory."""
        idle = list(self._idle)
        for held in idle:
            self._remove(held)
        return sum(held.tokens for held in idle)

    # --- room -------------------------------------------------------------------------------------------------------------------

    def _make_room(self, client: str, tokens: int, sequences: int, spared: set[_Held]) -> bool:
        """Evict until so many more of each fit; False, and nothing evicted, where they cannot."""
        account = self._accounts.get(client) or _Account()
        over = self.held_tokens + tokens - self.tokens
        over_own = account.tokens + tokens - self.client_tokens
        many = account.sequences + sequences - MAX_SEQUENCES
        if max(over, over_own, many) <= 0:
            return True
        gone: list[_Held] = []
        # Its own first: a client that decodes much pushes itself out before others.
        others = (held for held in self._idle if held.client != client)
        for held in itertools.chain(account.idle, others):
            if over <= 0 and over_own <= 0 and many <= 0:
                break
            if held not in spared and (held.client == client or over > 0):
                gone.append(held)
                over -= held.tokens
                over_own -= held.tokens if held.client == client else 0
                many -= held.client == client
        if over > 0 or over_own > 0 or many > 0:
            return False
        for held in gone:
            self._remove(held)
        return True

    def _add(self, held: _Held) -> None:
        self._sessions.setdefault(held.session, {})[held.number] = held
        account = self._accounts.setdefault(held.client, _Account())
        account.tokens += held.tokens
        account.sequences += 1

    def _remove(self, held: _Held) -> None:
        own, account = self._sessions[held.session], self._accounts[held.client]
        del own[held.number]
        if not own:
            del self._sessions[held.session]
        account.tokens -= held.tokens
        account.sequences -= 1
        if not account.sequences:
            del self._accounts[held.client]
        account.idle.pop(held, None)
        self._idle.pop(held, None)


def _fork(
    before: dict[int, KeptSequence], forward: Forward, wanted: dict[int, int], make: Callable[[], KeptSequence]
) -> dict[int, KeptSequence]:
    """What each new sequence, by number, is to be written behind: its parent's memory, where nobody else needs that and it is no
    larger than what is ``wanted`` takes, else a copy.
    """
    heirs: dict[int, int] = {}  # by parent that is overwritten: who takes its memory
    for number, (parent, _) in forward.sequences:
        if parent in wanted and (parent not in heirs or parent == number) and before[parent].room <= room_for(wanted[number]):
            heirs[parent] = number
    following: dict[int, KeptSequence] = {}
    for number, (parent, kept) in forward.sequences:
        if parent == NO_PARENT:
            following[number] = make()
        elif heirs.get(parent) != number:
            following[number] = before[parent].copy(kept)
    for number, (parent, kept) in forward.sequences:  # once nobody copies from it any more
        if number not in following:
            following[number] = before[parent]
            following[number].truncate(kept)
    return following


def _pairs(forward: Forward) -> Iterable[tuple[tuple[int, int], tuple[int, tuple[int, int]]]]:
    return zip(forward.segments, forward.sequences, strict=True)


def named(forward: Forward) -> set[int]:
    """The sequences that a forward reads or writes."""
    return {number for number, _ in forward.sequences} | {parent for _, (parent, _) in forward.sequences if parent != NO_PARENT}
