"""Live numbers of a run: what the trunk does now, and for whom.

The gateway, the trunk's loop and the channel tell one :class:`Meter` what happens; whoever shows numbers (the log, the metrics
endpoint) asks it for a snapshot. Every call may come from any thread and costs a few microseconds. Clients are known by their
names in the operator's list, so what a client did in an earlier session stays in its sums.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["QUEUE_BOUNDS", "Meter", "Ran"]

#: Upper bounds of the histogram of queue times, seconds.
QUEUE_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

# Queue times kept for the quantiles: of all clients, and of each.
_KEPT, _KEPT_OF_ONE = 2048, 128


class Ran(Protocol):
    """What the meter reads of a micro-batch that has run. ``arrived``, ``returned``: when its hidden states came, and its
    gradient, on the meter's clock.
    """

    client: str
    tokens: int
    longest: int
    arrived: float
    returned: float | None

    @property
    def segments(self) -> int: ...


class _Window:
    """A sum over the last ``seconds``, kept in slots of one second."""

    def __init__(self, seconds: int) -> None:
        self._slots = [0.0] * seconds
        self._newest = 0  # the second that the newest slot stands for

    def add(self, now: float, amount: float) -> None:
        self._turn(int(now))
        self._slots[self._newest % len(self._slots)] += amount

    def total(self, now: float) -> float:
        self._turn(int(now))
        return sum(self._slots)

    def _turn(self, second: int) -> None:
        size = len(self._slots)
        for passed in range(max(self._newest + 1, second - size + 1), second + 1):
            self._slots[passed % size] = 0.0
        self._newest = max(self._newest, second)


@dataclass(slots=True)
class _Queue:
    """Times from a message's arrival to the start of its batch, seconds: a histogram since the start, and the newest ones."""

    kept: int
    counts: list[int] = field(default_factory=lambda: [0] * (len(QUEUE_BOUNDS) + 1))
    total: float = 0.0
    newest: deque[float] = field(init=False)

    def __post_init__(self) -> None:
        self.newest = deque(maxlen=self.kept)

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(QUEUE_BOUNDS, seconds)] += 1
        self.total += seconds
        self.newest.append(seconds)


@dataclass(slots=True)
class _Client:
    """What one client has given and got, over all its sessions."""

    rate: _Window
    sessions: set[str] = field(default_factory=set)
    forwards: int = 0
    backwards: int = 0
    forward_tokens: int = 0
    backward_tokens: int = 0
    targets: int = 0
    steps: int = 0
    dropped: int = 0
    uncounted: int = 0
    queue: _Queue = field(default_factory=lambda: _Queue(_KEPT_OF_ONE))


class Meter:
    """``batch_tokens``: the budget of a batch, which occupancy is measured against. ``window``: seconds that rates and shares are
    taken over. ``packed``: the trunk runs no pads.
    """

    def __init__(
        self, batch_tokens: int = 1, *, window: int = 10, packed: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._batch_tokens, self._seconds, self._packed, self._clock = batch_tokens, window, packed, clock
        self._lock = threading.Lock()
        self._began = clock()
        self._clients: dict[str, _Client] = {}
        self._names: dict[str, str] = {}  # by open session
        self._queues = {"forward": _Queue(_KEPT), "backward": _Queue(_KEPT)}
        self._sums = {name: self._window() for name in ("tokens", "busy", "batches", "members", "slots")}
        self._busy = 0.0
        self._batches = {"forward": 0, "backward": 0}
        self._steps = self._dropped = 0
        self._events = 0
        self._waiting: Callable[[], int] = lambda: 0
        self._graphs: Callable[[], int] = lambda: 0
        self._kept: Callable[[str], int] = lambda session: 0
        self._traffic: Callable[[], Mapping[str, tuple[int, int]]] = dict

    def _window(self) -> _Window:
        return _Window(self._seconds)

    def watch(
        self,
        *,
        waiting: Callable[[], int],
        graphs: Callable[[], int],
        kept: Callable[[str], int],
        traffic: Callable[[], Mapping[str, tuple[int, int]]],
    ) -> None:
        """What others count themselves, asked for each snapshot, from its thread: tokens that wait for their forward, tokens
        whose graph is kept, tokens of one session under way, and (bytes received, bytes sent) by client.
        """
        self._waiting, self._graphs, self._kept, self._traffic = waiting, graphs, kept, traffic

    # --- what happens -----------------------------------------------------------------------------------------------------------

    def joined(self, session: str, client: str) -> None:
        """A session is open."""
        with self._lock:
            self._names[session] = client
            self._of(client).sessions.add(session)
            self._events += 1

    def left(self, session: str) -> None:
        """A session is over."""
        with self._lock:
            client = self._names.pop(session, None)
            if client is not None:
                self._clients[client].sessions.discard(session)
            self._events += 1

    def ran(self, direction: str, members: Sequence[Ran], *, began: float, seconds: float) -> None:
        """A batch has run; ``began`` on the meter's clock."""
        with self._lock:
            tokens = sum(member.tokens for member in members)
            self._busied(began + seconds, seconds)
            self._batches[direction] += 1
            self._events += 1
            for member in members:
                self._count(direction, member, began)
            if direction == "forward":
                padded = sum(member.segments for member in members) * max(member.longest for member in members)
                for name, amount in (
                    ("tokens", tokens),
                    ("batches", 1),
                    ("members", len(members)),
                    ("slots", tokens if self._packed else padded),
                ):
                    self._sums[name].add(began + seconds, amount)

    def _count(self, direction: str, member: Ran, began: float) -> None:
        client = self._of(member.client)
        if direction == "forward":
            client.forwards += 1
            client.forward_tokens += member.tokens
            client.rate.add(began, member.tokens)
        else:
            client.backwards += 1
            client.backward_tokens += member.tokens
        since = member.arrived if direction == "forward" else member.returned
        if since is not None:
            waited = max(0.0, began - since)
            self._queues[direction].add(waited)
            client.queue.add(waited)

    def uncounted(self, client: str) -> None:
        """The gradient of one of its micro-batches counted as zero."""
        with self._lock:
            self._of(client).uncounted += 1

    def step_closed(self, parts: Iterable[tuple[str, int, bool]], *, seconds: float = 0.0) -> None:
        """An optimizer step was made, in ``seconds``. ``parts``: each participant's (client, targets that counted, dropped)."""
        with self._lock:
            self._steps += 1
            self._events += 1
            self._busied(self._clock(), seconds)
            for name, targets, dropped in parts:
                client = self._of(name)
                client.steps += 1
                client.targets += targets
                client.dropped += dropped
                self._dropped += dropped

    def _busied(self, now: float, seconds: float) -> None:
        self._busy += seconds
        self._sums["busy"].add(now, seconds)

    def _of(self, client: str) -> _Client:
        found = self._clients.get(client)
        if found is None:
            found = self._clients[client] = _Client(self._window())
        return found

    # --- what is asked ----------------------------------------------------------------------------------------------------------

    @property
    def events(self) -> int:
        """Grows whenever something happens."""
        return self._events

    def snapshot(self) -> dict[str, Any]:
        """Plain values. Rates and shares are over the last ``window`` seconds, quantiles over the newest messages, sums since the
        start; times in seconds. What nothing was measured of is None.
        """
        traffic = self._traffic()
        now = self._clock()
        with self._lock:
            # The newest slot is a second that is not over yet.
            span = max(1e-9, min(self._seconds - 1 + now % 1, now - self._began))
            sums = {name: window.total(now) for name, window in self._sums.items()}
            clients = {name: self._client(client, traffic.get(name, (0, 0)), now, span) for name, client in self._clients.items()}
            taken = {
                "seconds": round(now - self._began, 3),
                "window": self._seconds,
                "sessions": len(self._names),
                "steps": self._steps,
                "dropped": self._dropped,
                "tokens": sum(client["tokens"] for client in clients.values()),
                "tokens_per_second": round(sums["tokens"] / span, 1),
                "forwards": sum(client["forwards"] for client in clients.values()),
                "backwards": sum(client["backwards"] for client in clients.values()),
                "batches": dict(self._batches),
                "occupancy": _share(sums["tokens"], sums["batches"] * self._batch_tokens),
                "members": _share(sums["members"], sums["batches"]),
                "padding": None if not sums["slots"] else round(1 - sums["tokens"] / sums["slots"], 4),
                "queue": {direction: list(queue.newest) for direction, queue in self._queues.items()},
                "busy": round(min(1.0, sums["busy"] / span), 4),
                "busy_seconds": round(self._busy, 3),
                "waiting_tokens": self._waiting(),
                "graph_tokens": self._graphs(),
                "bytes_received": sum(client["bytes_received"] for client in clients.values()),
                "bytes_sent": sum(client["bytes_sent"] for client in clients.values()),
                "clients": clients,
            }
        # Sorting for the quantiles takes milliseconds, for which the trunk's thread shall not wait.
        taken["queue"] = {direction: _quantiles(times) for direction, times in taken["queue"].items()}
        for client in clients.values():
            client["queue"] = _quantiles(client["queue"])
        return taken

    def loads(self) -> dict[str, float]:
        """Tokens that each present client trains on in a step, on average; 0 before its first."""
        with self._lock:
            present = {name: client for name, client in self._clients.items() if client.sessions}
            return {name: client.backward_tokens / client.steps if client.steps else 0.0 for name, client in present.items()}

    def histogram(self, direction: str) -> tuple[list[int], float]:
        """How many queue times lie in each interval of :data:`QUEUE_BOUNDS`, those above the last at the end; and their sum."""
        with self._lock:
            queue = self._queues[direction]
            return list(queue.counts), queue.total

    def _client(self, client: _Client, traffic: tuple[int, int], now: float, span: float) -> dict[str, Any]:
        received, sent = traffic
        return {
            "sessions": len(client.sessions),
            "steps": client.steps,
            "dropped": client.dropped,
            "uncounted": client.uncounted,
            "targets": client.targets,
            "tokens": client.forward_tokens,
            "backward_tokens": client.backward_tokens,
            "tokens_per_second": round(client.rate.total(now) / span, 1),
            "forwards": client.forwards,
            "backwards": client.backwards,
            "queue": list(client.queue.newest),
            "kept_tokens": sum(self._kept(session) for session in client.sessions),
            "bytes_received": received,
            "bytes_sent": sent,
        }


def _quantiles(times: Iterable[float]) -> dict[str, float | None]:
    """Median and 95th percentile, by nearest rank; None of nothing."""
    ordered = sorted(times)
    if not ordered:
        return {"median": None, "p95": None}
    return {name: round(ordered[int(share * len(ordered))], 6) for name, share in (("median", 0.5), ("p95", 0.95))}


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None
