"""How many connections strangers may begin: a refused CURVE handshake costs the server half a millisecond of computing, an
unfinished one the largest frame of its endpoint in memory.
"""

from __future__ import annotations

import ipaddress
import time
from collections import Counter
from collections.abc import Callable

#: Connections that one address may begin at once, and in a second after that. Two hundred clients behind one address fit.
BURST, RATE = 512, 50.0
#: Seconds for which an address that began more is shut out.
BLOCKED_SECONDS = 10.0
_ADDRESSES = 4096


def network_of(address: str) -> str:
    """What counts as one address: of IPv6 the 64 bits that a single subscriber is given."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


class Door:
    """Counts what each address begins. At most ``addresses`` are remembered, the oldest is forgotten first."""

    def __init__(
        self,
        *,
        burst: int = BURST,
        rate: float = RATE,
        seconds: float = BLOCKED_SECONDS,
        addresses: int = _ADDRESSES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._burst, self._rate, self._seconds, self._limit, self._clock = burst, rate, seconds, addresses, clock
        self._left: dict[str, tuple[float, float]] = {}  # connections left to an address, and since when
        self._blocked: dict[str, float] = {}  # until when

    def knock(self, network: str) -> bool:
        """A connection has begun: whether it may stay."""
        now = self._clock()
        if network in self._blocked:
            return False
        if network not in self._left and len(self._left) >= self._limit:
            del self._left[next(iter(self._left))]
        left, since = self._left.pop(network, (float(self._burst), now))
        left = min(self._burst, left + self._rate * (now - since)) - 1
        self._left[network] = max(left, 0.0), now
        if left < 0:
            self._blocked[network] = now + self._seconds
        return left >= 0

    def blocked(self) -> list[str]:
        """Who is shut out now."""
        now = self._clock()
        self._blocked = {network: until for network, until in self._blocked.items() if now < until}
        return list(self._blocked)


def excess(half_open: dict[int, str], most: int) -> list[int]:
    """Which of the unfinished handshakes (number to network, oldest first) must go where at most ``most`` may be: the oldest of
    whoever has the most.
    """
    counts, gone = Counter(half_open.values()), []
    left = dict(half_open)
    while len(left) > most:
        network = counts.most_common(1)[0][0]
        oldest = next(number for number, whose in left.items() if whose == network)
        counts[network] -= 1
        del left[oldest]
        gone.append(oldest)
    return gone
