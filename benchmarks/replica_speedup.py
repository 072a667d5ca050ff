"""What does another replica bring that has a core or a GPU of its own? N replicas against one, each with as many threads.

Servers stand side by side, one plain and one with N replicas; light clients, as many for each and N at least, work now on the
one, now on the other, so that drift of the machine hits both. The figure is the median over rounds of the ratio of tokens/s. With
``sync = step`` the cost of the all-reduce at every step is in it, with ``sync = K`` that of one average every K steps.

How much of it is the machine's doing is measured in the same rounds: N plain servers that know nothing of each other, each with
its share of the clients, are the most that N replicas could reach on this box, where cores share memory, caches and power.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.light import light_clients
from benchmarks.report import median_interval
from benchmarks.stage import Stage

__all__ = [
    "Side",
    "alternate",
    "dealt",
    "hierarchical",
    "measure_speedup",
    "name_of",
    "ratios",
    "seconds_a_step",
    "steps_between_meetings",
]


def hierarchical(replicas: int, sync: str) -> dict[str, Any]:
    """The settings that make a run hierarchical."""
    return {"mode": "hierarchical", "replicas": replicas, "sync": sync}


def name_of(replicas: int, sync: str) -> str:
    """How such a mode is called in results and plots."""
    return f"hierarchical-{replicas}" + (f" sync {sync}" if sync != "step" else "")


def steps_between_meetings(sync: str) -> int:
    """Steps from one meeting of the replicas to the next."""
    return 1 if sync == "step" else int(sync)


def dealt(clients: int, replicas: int) -> list[int]:
    """How many of the clients each of the replicas has, as even as can be."""
    return [clients // replicas + (number < clients % replicas) for number in range(replicas)]


def seconds_a_step(spans: Sequence[Sequence[float]]) -> float:
    """From the clock at the end of each step of each client, over whole rounds: mean seconds, median over clients."""
    return statistics.median((ends[-1] - ends[0]) / (len(ends) - 1) for ends in spans)


class Side:
    """A server with its light clients, in so many processes of ``crowds``. ``settings`` go over the run's."""

    def __init__(
        self,
        settings: dict[str, Any],
        recording: str,
        model_dir: str,
        sizes: dict[str, int],
        clients: int,
        *,
        crowds: int = 1,
    ) -> None:
        self.clients, self.rows, self.length = clients, sizes["rows"], sizes["length"]
        own = {"clients": self.clients, "status_every": 0.0, "step_deadline": 0.0}
        self.stage = Stage(own | settings, clients=self.clients, hidden=0, blocks=0, model_dir=model_dir)
        try:
            self._crowds: list[Connection] = []
            for number in range(crowds):
                joins, keys = self.stage.joins[number::crowds], self.stage.keys[number::crowds]
                self._crowds.append(self.stage.start(light_clients, joins, keys, self.rows, self.length, recording))
            for crowd in self._crowds:
                crowd.recv()
        except BaseException:
            self.stage.close()
            raise

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stage.close()

    def begin(self, steps: int) -> None:
        """``steps`` steps, after one that is not counted."""
        for crowd in self._crowds:
            crowd.send(steps + 1)

    def tokens_per_second(self) -> float:
        """Of the steps that were begun, once they are made."""
        spans = [span for crowd in self._crowds for span in crowd.recv()]
        return self.clients * self.rows * self.length / seconds_a_step(spans)


def _rate_of(sides: Sequence[Side], steps: int) -> float:
    """Tokens/s of all these together, each with ``steps`` steps."""
    for side in sides:
        side.begin(steps)
    return sum([side.tokens_per_second() for side in sides])


def alternate(
    kinds: Mapping[str, Sequence[Side]], steps: int, goes_on: Callable[[int], bool], *, warm_up: int
) -> dict[str, list[float]]:
    """Tokens/s of each kind, the sides of which work together, in blocks of ``steps``: one of each while ``goes_on(rounds
    made)``, after a block of ``warm_up`` steps that is not counted.
    """
    for sides in kinds.values():
        _rate_of(sides, warm_up)
    seen: dict[str, list[float]] = {kind: [] for kind in kinds}
    made = 0
    while goes_on(made):
        # The order alternates, so that none always runs on the warmer caches.
        for kind in list(kinds) if made % 2 else reversed(list(kinds)):
            seen[kind].append(_rate_of(kinds[kind], steps))
        made += 1
    return seen


def ratios(of: Sequence[float], to: Sequence[float]) -> list[float]:
    """Of each round."""
    return [one / other for one, other in zip(of, to, strict=True)]


def measure_speedup(
    settings: dict[str, Any],
    common: dict[str, Any],
    recording: str,
    model_dir: str,
    sizes: dict[str, int],
    *,
    pairs: int,
    steps: int,
) -> dict[str, Any]:
    """``settings``: those of :func:`hierarchical`; ``common``: of both servers, threads and device among them. ``steps``: of a
    block, at least. Of more replicas than ``sizes`` has clients each has one.
    """
    replicas, sync = settings["replicas"], settings["sync"]
    every = steps_between_meetings(sync)
    steps = -(-steps // every) * every
    clients = max(sizes["clients"], replicas)
    with contextlib.ExitStack() as open_sides:

        def side(settings: dict[str, Any], clients: int) -> Side:
            return open_sides.enter_context(Side(settings, recording, model_dir, sizes, clients))

        kinds = {
            "one": [side(common, clients)],
            "many": [side(common | settings, clients)],
            "apart": [side(common, share) for share in dealt(clients, replicas)],
        }
        seen = alternate(kinds, steps, lambda made: made < pairs, warm_up=every)
    median, low, high = median_interval(ratios(seen["many"], seen["one"]))
    ceiling, ceiling_low, ceiling_high = median_interval(ratios(seen["apart"], seen["one"]))
    result = {
        "speedup": round(median, 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "pairs": pairs,
        "clients": clients,
        "unrelated_servers": {"speedup": round(ceiling, 4), "interval_95": [round(ceiling_low, 4), round(ceiling_high, 4)]},
        "share_of_unrelated": round(statistics.median(ratios(seen["many"], seen["apart"])), 4),
        "one_tokens_per_second": round(statistics.median(seen["one"]), 1),
        "tokens_per_second": round(statistics.median(seen["many"]), 1),
    }
    print(
        f"{name_of(replicas, sync)}, {common['threads']} thread(s) each: {median:.3f} times one replica "
        f"(95 % {low:.3f} to {high:.3f}, {pairs} pairs), {result['tokens_per_second']:.0f} tokens/s; "
        f"{replicas} servers apart: {ceiling:.3f} ({ceiling_low:.3f} to {ceiling_high:.3f})",
        flush=True,
    )
    return result
