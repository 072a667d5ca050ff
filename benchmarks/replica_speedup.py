"""What does another replica bring that has a core or a GPU of its own? N replicas against one, each with as many threads.

Two servers stand side by side, one plain and one with N replicas; light clients, as many for each, work now on the one, now on
the other, so that drift of the machine hits both. The figure is the median over pairs of the ratio of tokens/s. With ``sync =
step`` the cost of the all-reduce at every step is in it, with ``sync = K`` that of one average every K steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.light import light_clients
from benchmarks.report import median_interval
from benchmarks.stage import Stage

__all__ = ["hierarchical", "measure_speedup", "name_of", "seconds_a_step", "steps_between_meetings"]


def hierarchical(replicas: int, sync: str) -> dict[str, Any]:
    """The settings that make a run hierarchical."""
    return {"mode": "hierarchical", "replicas": replicas, "sync": sync}


def name_of(replicas: int, sync: str) -> str:
    """How such a mode is called in results and plots."""
    return f"hierarchical-{replicas}" + (f" sync {sync}" if sync != "step" else "")


def steps_between_meetings(sync: str) -> int:
    """Steps from one meeting of the replicas to the next."""
    return 1 if sync == "step" else int(sync)


def seconds_a_step(spans: Sequence[Sequence[float]]) -> float:
    """From the clock at the end of each step of each client, over whole rounds: mean seconds, median over clients."""
    return statistics.median((ends[-1] - ends[0]) / (len(ends) - 1) for ends in spans)


class _Side:
    """A server with its light clients. ``settings`` go over the run's."""

    def __init__(self, settings: dict[str, Any], recording: str, model_dir: str, sizes: dict[str, int]) -> None:
        self.clients, self.rows, self.length = sizes["clients"], sizes["rows"], sizes["length"]
        own = {"clients": self.clients, "status_every": 0.0, "step_deadline": 0.0}
        self.stage = Stage(own | settings, clients=self.clients, hidden=0, blocks=0, model_dir=model_dir)
        try:
            self._crowd: Connection = self.stage.start(
                light_clients, self.stage.joins, self.stage.keys, self.rows, self.length, recording
            )
            self._crowd.recv()
        except BaseException:
            self.stage.close()
            raise

    def tokens_per_second(self, steps: int) -> float:
        """Over ``steps`` steps, after one that is not counted."""
        self._crowd.send(steps + 1)
        return self.clients * self.rows * self.length / seconds_a_step(self._crowd.recv())


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
    block, at least.
    """
    replicas, sync = settings["replicas"], settings["sync"]
    every = steps_between_meetings(sync)
    steps = -(-steps // every) * every
    one = _Side(common, recording, model_dir, sizes)
    try:
        many = _Side(common | settings, recording, model_dir, sizes)
        try:
            for side in (one, many):
                side.tokens_per_second(every)
            seen: list[tuple[float, float]] = []
            for pair in range(pairs):
                # The order within a pair alternates too, so that neither always runs on the warmer caches.
                order = (one, many) if pair % 2 else (many, one)
                rates = {side: side.tokens_per_second(steps) for side in order}
                seen.append((rates[one], rates[many]))
        finally:
            many.stage.close()
    finally:
        one.stage.close()
    median, low, high = median_interval([b / a for a, b in seen])
    result = {
        "speedup": round(median, 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "pairs": pairs,
        "one_tokens_per_second": round(statistics.median(a for a, _ in seen), 1),
        "tokens_per_second": round(statistics.median(b for _, b in seen), 1),
    }
    print(
        f"{name_of(replicas, sync)}, {common['threads']} thread(s) each: {median:.3f} times one replica "
        f"(95 % {low:.3f} to {high:.3f}, {pairs} pairs), {result['tokens_per_second']:.0f} tokens/s",
        flush=True,
    )
    return result
