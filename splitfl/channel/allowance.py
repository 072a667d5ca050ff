"""What one client may send in a second, over all its sessions. Who has sent more gets its credit later; nobody else waits for it.

Buckets that may be overdrawn (a token bucket, RFC 2697, that lets the message through which empties it): a message is charged
when it begins, and the wait comes with the credit for the next ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from splitfl.protocol.limits import Limit

# Of every client, whatever its line says: a message costs the server time however small it is, so small ones are counted; and so
# many segments or sequences in one cost as much as a small message.
_SMALL_BYTES, _SMALL_ITEMS = 16 * 1024, 64
_SMALL_A_SECOND, _SMALL_AT_ONCE = 2000, 8192
# Seconds by which a client may be ahead of that: credit hardly slows who sends only small messages, as they cost hardly any.
_SMALL_AHEAD = 10.0
# Control messages, each counted as one and one more for so many bytes: what it costs to be decoded goes by its size.
_CONTROL_A_SECOND, _CONTROL_AT_ONCE, _CONTROL_BYTES = 1000, 4096, 256
_SESSIONS_A_SECOND, _SESSIONS_AT_ONCE = 2, 120


class Bucket:
    """Holds at most ``burst``, gains ``rate`` a second; overdrawn, it is to be waited for. A rate of 0 stands for no limit."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float]) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._level, self._since = burst, clock()

    def set(self, rate: float, burst: float) -> None:
        """Another rate from now on; what is overdrawn stays so."""
        if (rate, burst) != (self._rate, self._burst):
            self._gain()
            self._level = min(self._level, burst) if self._rate else burst
            self._rate, self._burst = rate, burst

    def take(self, amount: float) -> None:
        """Takes ``amount``, be it there or not."""
        if self._rate:
            self._gain()
            self._level -= amount

    def wait(self) -> float:
        """Seconds until nothing is overdrawn."""
        if not self._rate:
            return 0.0
        self._gain()
        return max(0.0, -self._level / self._rate)

    @property
    def overdrawn(self) -> float:
        """Seconds that had to be waited when it was last taken from."""
        return -self._level / self._rate if self._rate else 0.0

    def _gain(self) -> None:
        now = self._clock()
        self._level = min(self._burst, self._level + self._rate * (now - self._since))
        self._since = now


class Allowance:
    """The buckets of one client."""

    def __init__(self, limits: Mapping[str, Limit], clock: Callable[[], float]) -> None:
        self._bytes, self._tokens = Bucket(0, 0, clock), Bucket(0, 0, clock)
        self._small = Bucket(_SMALL_A_SECOND, _SMALL_AT_ONCE, clock)
        self._control = Bucket(_CONTROL_A_SECOND, _CONTROL_AT_ONCE, clock)
        self.sessions = Bucket(_SESSIONS_A_SECOND, _SESSIONS_AT_ONCE, clock)
        self.limit(limits)

    def limit(self, limits: Mapping[str, Limit]) -> None:
        """The line's limits, as they are now."""
        for bucket, name in ((self._bytes, "bytes_per_second"), (self._tokens, "tokens_per_second")):
            rate = float(limits.get(name, 0))
            bucket.set(rate, rate)

    def control(self, size: int) -> bool:
        """A control message of ``size`` bytes has come; False where this client has sent more of them than it may."""
        self._control.take(1 + size / _CONTROL_BYTES)
        return self._control.overdrawn <= 0

    def begun(self, payload_bytes: int, tokens: int, items: int = 0) -> None:
        """A data message has begun, with so many ``items`` in its metadata."""
        small = (payload_bytes < _SMALL_BYTES) + items // _SMALL_ITEMS
        if small:
            self._small.take(small)
        self._bytes.take(payload_bytes)
        self._tokens.take(tokens)

    @property
    def flooded(self) -> bool:
        """Whether this client sends so many small messages that it is to be ended."""
        # Large messages take nothing of it, so it may have been refilled since it was last taken from.
        return self._small.overdrawn > _SMALL_AHEAD and self._small.wait() > _SMALL_AHEAD

    def wait(self) -> float:
        """Seconds until this client may have more credit."""
        return max(self._bytes.wait(), self._tokens.wait(), self._small.wait())
