"""What befalls the links and the processes of a soak, drawn by seed; each is noted as it happens."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.faults.relay import Passing
from tests.soak.site import Site

__all__ = ["Faults"]

#: Seconds between two faults; for how long a link is out of order, and a disk full.
_BETWEEN, _LASTS, _FULL = (4.0, 12.0), (0.2, 9.0), (0.5, 15.0)
_FRAMES: dict[str, Callable[[Passing], bytes]] = {
    "byte flipped": lambda passing: passing.frame.flipped(),
    "frame dropped": lambda passing: b"",
    "frame duplicated": lambda passing: 2 * passing.frame.raw,
}
_LINKS = ("link cut", "link stalled", "slow reader")
#: A client is killed as often as each of the others happens, and its clock put right or wrong, by up to so many seconds.
_KINDS = (*_FRAMES, *_LINKS, "client killed", "clock jump", "client's disk full")
_WRONG = 30 * 86400.0
#: The server ends after these shares of the time, in turn killed and asked to stop.
_SERVER_ENDS = (0.2, 0.35, 0.5)
#: And so many times its disk is full, between these shares: its last life is left long enough to be judged. The first time it
#: stays so until the server has ended, and so does a client's each time with this probability: who never ends for it is seen.
_SERVER_FULL, _FULL_SHARES, _STAYS_FULL = 4, (0.05, 0.47), 0.4


class Faults:
    """``seconds``: how long the soak takes. :meth:`turn` is called all the time."""

    def __init__(self, site: Site, seconds: float, seed: int) -> None:
        self._site, self._draw = site, random.Random(f"faults {seed}")
        self._next = 10.0
        self._ends = [(share * seconds, "asked to stop" if index % 2 else "killed") for index, share in enumerate(_SERVER_ENDS)]
        fulls = _SERVER_FULL if site.disks["server"].is_small else 0
        self._fulls = sorted(seconds * self._draw.uniform(*_FULL_SHARES) for _ in range(fulls))
        self._full_until_end: dict[str, float] = {}  # whose disk: since when, seconds of the wall clock
        self._back_at: float | None = None  # when the server that has ended is started again
        self._heal: list[tuple[float, Callable[[], None]]] = []
        self.done: list[dict[str, Any]] = []

    @property
    def counted(self) -> dict[str, int]:
        return dict(Counter(fault["what"] for fault in self.done))

    def turn(self, now: float) -> None:
        """``now``: seconds since the soak began."""
        for _, heal in [due for due in self._heal if due[0] <= now]:
            heal()
        self._heal = [due for due in self._heal if due[0] > now]
        self._free_those_of_the_ended()
        if self._back_at is not None:
            if now >= self._back_at:
                self._site.disks["server"].free()
                self._full_until_end.pop("server", None)
                self._site.start_server()
                self._back_at = None
        elif self._site.has_no_room:
            self._site.note_end()
            self._back_at = now + self._draw.uniform(0.5, 6.0)
        elif self._ends and now >= self._ends[0][0]:
            self._end_server(now)
        elif self._fulls and now >= self._fulls[0]:
            self._fill_server(now)
        if now >= self._next:
            self._next = now + self._draw.uniform(*_BETWEEN)
            self._strike(now)

    def _end_server(self, now: float) -> None:
        # Each of its lives is to be seen, and whether it ends by itself where its disk stays full.
        if "server" in self._full_until_end or not self._site.has_made_a_step:
            return
        _, how = self._ends.pop(0)
        self._note(f"server {how}", "server", now)
        self._site.end_server(how)
        self._back_at = now + self._draw.uniform(0.5, 6.0)

    def _fill_server(self, now: float) -> None:
        if not self._site.disks["server"].is_full and self._site.has_made_a_step:
            is_first = len(self._fulls) == _SERVER_FULL
            self._fulls.pop(0)
            self._fill("disk full", "server", now, until_end=is_first)

    def heal_all(self) -> None:
        for relay in self._site.relays.values():
            relay.at(lambda passing: False, lambda passing: passing.frame.raw)
            relay.heal()
        for disk in self._site.disks.values():
            disk.free()
        self._heal.clear()
        self._full_until_end.clear()

    def _note(self, what: str, client: str, now: float, **more: Any) -> None:
        self.done.append({"time": time.time(), "at": round(now, 1), "what": what, "client": client, **more})

    def _fill(self, what: str, whose: str, now: float, *, until_end: bool) -> None:
        disk = self._site.disks[whose]
        if not disk.is_small or disk.is_full:
            return
        self._note(what, whose, now, until_end=until_end)
        free = disk.fill()
        if until_end:
            self._full_until_end[whose] = time.time()
        else:
            self._heal.append((now + self._draw.uniform(*_FULL), free))

    def _free_those_of_the_ended(self) -> None:
        """Of the clients: the server's is freed as it is started again."""
        ended = {ending["client"]: ending["time"] for ending in self._site.endings}
        for client, since in list(self._full_until_end.items()):
            if ended.get(client, 0.0) >= since:
                self._site.disks[client].free()
                del self._full_until_end[client]

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
        if kind == "client's disk full":
            self._fill(kind, self._draw.choice(self._site.apart), now, until_end=self._draw.random() < _STAYS_FULL)
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
        self._heal.append((now + self._draw.uniform(*_LASTS), relay.heal))
