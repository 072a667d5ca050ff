"""The soak itself: begin, let things befall the run for so long while looking at it all the time, and bring it to a good end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil

from tests.faults.stage import wait_until
from tests.soak.faults import Faults
from tests.soak.site import Site

__all__ = ["Record", "soak"]

#: Seconds: between two looks at the processes; a longer pause of this process was one of the whole machine, which is forgiven.
_LOOK, _PAUSE = 1.0, 6.0
#: Seconds in which the clients come to an end, and the server's last connections are gone.
_ENDING = 240.0


@dataclass
class Record:
    """What was seen: ``samples`` of processes, ``pauses`` of the machine (wall clock, from and to), the faults that struck."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    pauses: list[tuple[float, float]] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    left_over: list[str] = field(default_factory=list)  # what should be gone at the end and is not


class _Watch:
    """Looks at the processes every second; counts the time in which this machine was not paused."""

    def __init__(self, site: Site, record: Record) -> None:
        self._site, self._record = site, record
        self._seen, self._sampled = time.monotonic(), 0.0
        self._processes: dict[int, psutil.Process] = {}

    def turn(self) -> None:
        now = time.monotonic()
        gap, self._seen = now - self._seen, now
        if gap > _PAUSE:
            self._record.pauses.append((time.time() - gap, time.time()))
            gap = 0.0
        self._record.seconds += gap
        if now - self._sampled >= _LOOK:
            self._sampled = now
            if self._site.server is not None:
                self._look("server", self._site.server.pid)
            if self._site.crowd is not None:
                self._look("crowd", self._site.crowd.pid)

    def _look(self, who: str, pid: int) -> None:
        try:
            process = self._processes.get(pid) or self._processes.setdefault(pid, psutil.Process(pid))
            with process.oneshot():
                sample = {
                    "rss_mib": round(process.memory_info().rss / 2**20, 2),
                    "files": process.num_fds(),
                    "threads": process.num_threads(),
                    "cpu_seconds": round(sum(process.cpu_times()[:2]), 2),
                }
        except psutil.Error:
            return
        self._record.samples.append({"time": time.time(), "at": round(self._record.seconds, 2), "who": who, "pid": pid, **sample})


def soak(site: Site, minutes: float, seed: int, say: Callable[[str], None]) -> Record:
    """Raises AssertionError where it does not come to an end."""
    record = Record()
    site.start_server()
    wait_until(lambda: any(event["event"] == "serving" for event in site.events()))
    site.start_crowd(seed)
    watch, faults, said = _Watch(site, record), Faults(site, 60 * minutes, seed), 0.0
    record.faults = faults.done
    while record.seconds < 60 * minutes or not site.is_up:
        watch.turn()
        faults.turn(record.seconds)
        site.tend()
        if record.seconds - said >= 60:
            said = record.seconds
            say(_line(record))
        assert site.server is None or site.is_up or site.has_no_room, "the server has ended by itself"
        assert site.crowd is not None
        assert site.crowd.poll() is None, "the process of the clients has ended by itself"
        time.sleep(0.1)
    faults.heal_all()
    site.end_crowd()
    _end(site, record, watch)
    (site.work / "record.json").write_text(json.dumps(vars(record)))
    return record


def _end(site: Site, record: Record, watch: _Watch) -> None:
    """All clients come to an end, and nothing of them is left at the server, which is then asked to stop."""
    waited, before = 0.0, record.seconds
    while not site.is_empty:
        watch.turn()
        waited = record.seconds - before
        assert waited < _ENDING, "clients do not come to an end"
        site.tend(more=False)
        time.sleep(0.1)
    assert site.crowd is not None
    if site.crowd.returncode:
        record.left_over.append(f"the process of the clients ended with {site.crowd.returncode}")
    try:
        wait_until(lambda: not site.connections(), 30)
    except AssertionError:
        record.left_over.append(f"{site.connections()} connections of the server")
    watch.turn()
    site.end_server("asked to stop")
    for relay in site.relays.values():
        relay.close()
    wait_until(lambda: not site.listening(), 5, why=lambda: "somebody listens at the server's ports")


def _line(record: Record) -> str:
    newest = {sample["who"]: sample for sample in record.samples}
    parts = [
        f"{who} {sample['rss_mib']:.0f} MiB, {sample['files']} files, {sample['threads']} threads"
        for who, sample in newest.items()
    ]
    return f"{record.seconds / 60:.0f} min: {'; '.join(parts)}; {len(record.faults)} faults"
