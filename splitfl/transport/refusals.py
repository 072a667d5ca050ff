"""A limit on what strangers can make a server write: each refused handshake is a line in its log, and handshakes are
cheap to send.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from splitfl.transport.door import network_of

Report = Callable[[str, str, str], None]


class RefusalLog:
    """Passes on the first ``burst`` refusals of an address (of IPv6: one /64; or of a key) in any ``seconds``; the next one after
    that says how many it left out.

    At most ``addresses`` are remembered, the oldest is forgotten first.
    """

    def __init__(
        self,
        report: Report,
        *,
        burst: int = 5,
        seconds: float = 60.0,
        addresses: int = 4096,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._report, self._burst, self._seconds, self._limit, self._clock = report, burst, seconds, addresses, clock
        # By address, kind, and whether once is enough: the start of the interval, refusals since.
        self._seen: dict[tuple[str, str, bool], tuple[float, int]] = {}

    def refused(self, address: str, who: str, code: str, text: str, *, kind: str = "", once: bool = False) -> None:
        """One refusal. ``kind``: those of one kind are counted apart from the address's others. ``once``: one line an interval is
        enough; counted apart too.
        """
        now, burst = self._clock(), 1 if once else self._burst
        key = network_of(address), kind, once
        start, count = self._seen.get(key, (now, 0))
        left_out = 0
        if now - start >= self._seconds:
            left_out = max(0, count - burst)
            start, count = now, 0
        if key not in self._seen and len(self._seen) >= self._limit:
            del self._seen[next(iter(self._seen))]
        self._seen[key] = start, count + 1
        if count < burst:
            self._report(who, code, f"{text} ({left_out} more refusals not shown)" if left_out else text)
