"""What befalls the links and the processes of a soak, drawn by seed; each is noted as it happens."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.faults.relay import Passing, Relay
from tests.soak.site import Site

__all__ = ["Faults"]

#: Seconds between two faults, and for how long a link is out of order.
_BETWEEN, _LASTS = (4.0, 12.0), (0.2, 9.0)
_FRAMES: dict[str, Callable[[Passing], bytes]] = {
    "byte flipped": lambda passing: passing.frame.flipped(),
    "frame dropped": lambda passing: b"",
    "frame duplicated": lambda passing: 2 * passing.frame.raw,
}
_LINKS = ("link cut", "link stalled", "slow reader")
#: A client is killed as often as each of the others happens, and its clock put right or wrong, by up to so many seconds.
_KINDS = (*_FRAMES, *_LINKS, "client killed", "clock jump")
_WRONG = 30 * 86400.0
#: The server ends after these shares of the time, in turn killed and asked to stop.
_SERVER_ENDS = (0.2, 0.35, 0.5)


class Faults:
    """``seconds``: how long the soak takes. :meth:`turn` is called all the time."""

    def __init__(self, site: Site, seconds: float, seed: int) -> None:
        self._site, self._draw = site, random.Random(f"faults {seed}")
        self._next = 10.0
        self._ends = [(share * seconds, "asked to stop" if index % 2 else "killed") for index, share in enumerate(_SERVER_ENDS)]
        self._back_at: float | None = None  # when the server that has ended is started again
        self._heal: list[tuple[float, Relay]] = []
        self.done: list[dict[str, Any]] = []

    @property
    def counted(self) -> dict[str, int]:
        return dict(Counter(fault["what"] for fault in self.done))

    def turn(self, now: float) -> None:
        """``now``: seconds since the soak began."""
        for _, relay in [due for due in self._heal if due[0] <= now]:
            relay.heal()
        self._heal = [due for due in self._heal if due[0] > now]
        if self._back_at is not None:
            if now >= self._back_at:
                self._site.start_server()
                self._back_at = None
        elif self._ends and now >= self._ends[0][0]:
            _, how = self._ends.pop(0)
            self._note(f"server {how}", "server", now)
            self._site.end_server(how)
            self._back_at = now + self._draw.uniform(0.5, 6.0)
        if now >= self._next:
            self._next = now + self._draw.uniform(*_BETWEEN)
            self._strike(now)

    def heal_all(self) -> None:
        for relay in self._site.relays.values():
            relay.at(lambda passing: False, lambda passing: passing.frame.raw)
            relay.heal()
        self._heal.clear()

    def _note(self, what: str, client: str, now: float) -> None:
        self.done.append({"time": time.time(), "at": round(now, 1), "what": what, "client": client})

    def _strike(self, now: float) -> None:
        kind = self._draw.choice(_KINDS)
        if kind == "client killed":
            client = self._draw.choice(self._site.apart)
            if self._site.kill(client):
                self._note(kind, client, now)
            return
        if kind == "clock jump":
            client = self._draw.choice(self._site.apart)
            self._site.clocks[client].value = self._draw.uniform(-_WRONG, _WRONG)
            self._note(kind, client, now)
            return
        client = self._draw.choice(list(self._site.relays))
        relay = self._site.relays[client]
        if kind in _FRAMES:
            is_data, way, change = self._draw.random() < 0.6, self._draw.choice(["up", "down"]), _FRAMES[kind]

            def do(passing: Passing) -> bytes:
                self._note(kind, client, now)
                return change(passing)

            relay.at(lambda passing: passing.is_data is is_data and passing.way == way, do)
            return
        self._note(kind, client, now)
        if kind == "link cut":
            relay.cut()
        elif kind == "link stalled":
            relay.stall()
        else:
            relay.throttle(4000)
        self._heal.append((now + self._draw.uniform(*_LASTS), relay))
