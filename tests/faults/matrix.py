"""The table of faults and the places that they strike at; how each is done to a :class:`~tests.faults.stage.Stage`.

All of them befall client 1, its link, or the server, in step 2 of 5; client 0 has nothing to do with it, and its result has to be
right all the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from tests.faults.disk import NO_ROOM, fill, free
from tests.faults.processes import FAILURE, SILENCE, Stop, clock
from tests.faults.relay import Passing
from tests.faults.stage import Stage, wait_until

__all__ = ["CELLS", "FAULTS", "NO_CELL", "PLACES", "assert_struck", "strike"]

STEP = 2
PLACES = ("session open", "forward", "forward answered", "backward", "backward answered", "step boundary", "checkpoint")
FAULTS = (
    "client killed",
    "server killed",
    "server failed",
    "link cut 1 s",
    "link cut 30 s",
    "link stalled",
    "data delayed",
    "control delayed",
    "byte flipped",
    "frame dropped",
    "frame duplicated",
    "slow reader",
    "disk full",
    "client's disk full",
    "clock jump",
)

#: What befalls a frame has an answer to befall too; for the others an answer under way is no other place.
_FRAMES = ("byte flipped", "frame dropped", "frame duplicated")

#: Each connection by itself, so that messages of one overtake those of the other.
_DELAYED = ("data delayed", "control delayed")
#: What is nothing to end a session for.
_HARMLESS = ("slow reader", "clock jump", *_DELAYED)

#: Cells that cannot exist, and why.
NO_CELL = {
    (fault, place): f"{fault}: the moment is that of the {place.split()[0]} itself, which has its cell"
    for fault in FAULTS
    for place in ("forward answered", "backward answered")
    if fault not in _FRAMES
}

CELLS = [(fault, place) for fault in FAULTS for place in PLACES if (fault, place) not in NO_CELL]

#: Whoever is struck as it first joins says so and ends: it has no session yet that it could have again.
_AT_FIRST = ""


def _is_at(place: str) -> Callable[[Passing], bool]:
    """The frame that a fault strikes at. Client 1 sends Attach, then a Forward and a Backward a step, each answered by one."""
    if place == "session open":
        return lambda passing: passing.is_data and passing.way == "up" and passing.session == 0
    if place == "checkpoint":
        return lambda passing: passing.is_heartbeat and passing.way == "up"
    way = "down" if "answered" in place else "up"
    number = 2 * STEP + (1 if "forward" in place else 2)
    if place != "step boundary":
        return lambda passing: passing.is_payload and passing.way == way and passing.message == number
    seen = threading.Event()

    def is_done(passing: Passing) -> bool:
        """StepDone: what client 1 says next once it has its gradient."""
        if passing.is_payload and passing.way == "down" and passing.message == number:
            seen.set()
        return seen.is_set() and not passing.is_data and passing.way == "up" and not passing.is_heartbeat

    return is_done


def strike(fault: str, place: str, stage: Stage, *, disk: Path | None = None) -> None:
    """Begin the run, let the fault happen, and see it through. ``disk``: a small one, mounted where it is to be full."""
    relay = stage.relay
    after: list[threading.Timer] = []

    def later(seconds: float, action: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, action)
        timer.daemon = True
        timer.start()
        after.append(timer)

    def happen(passing: Passing | None) -> bytes:
        """``passing``: the frame that is struck; None: no frame is, but a moment. Returns what passes in its place."""
        raw = b"" if passing is None else passing.frame.raw
        if fault == "client killed":
            stage.kill("client1")
            return raw[: len(raw) // 2]
        if fault == "server killed":
            stage.kill("server")
        elif fault == "server failed":
            stage.fail_server()
        elif fault.startswith("link cut"):
            relay.cut()
            later(float(fault.split()[2]), relay.heal)
        elif fault == "link stalled":
            relay.stall()
            later(SILENCE + 2, relay.heal)
        elif fault in _DELAYED:
            relay.delay(**{fault.split()[0]: 1.0})
            later(4, relay.heal)
        elif fault == "byte flipped":
            assert passing is not None
            return passing.frame.flipped()
        elif fault == "frame dropped":
            return b""
        elif fault == "frame duplicated":
            return raw + raw
        elif fault == "slow reader":
            relay.throttle(4000)
            later(4, relay.heal)
        elif fault == "clock jump":
            stage.clocks["server"].value, stage.clocks["client1"].value = -7200.0, 30 * 86400.0
        else:
            assert disk is not None
            fill(disk)
        return raw

    if fault == "clock jump":
        stage.clocks |= {"server": clock(), "client1": clock()}
    if place == "session open" and fault not in ("client killed", *_HARMLESS, "disk full", "client's disk full"):
        stage.expects["client1"] = _AT_FIRST
    if fault == "server failed":
        stage.expects["server"], stage.codes["server"] = f"the trunk failed: {FAILURE}", 1
    if disk is not None:
        who = "server" if fault == "disk full" else "client1"
        stage.expects[who] = NO_ROOM
        stage.before_again = lambda name: free(disk) if name == who else None
    if place != "checkpoint":
        relay.at(_is_at(place), happen)
        stage.begin()
        wait_until(relay.fired.is_set, why=stage.said)
    else:
        who = "client1" if "client" in fault else "server"
        stop = stage.stops[who] = Stop(STEP, stage.work)
        stage.begin()
        wait_until(lambda: stop.is_reached, why=stage.said)
        if fault in _FRAMES:
            relay.at(_is_at(place), happen)
            wait_until(relay.fired.is_set, why=stage.said)
            if fault == "frame dropped":  # noticed at the next heartbeat, before which the run might else be over
                wait_until(lambda: stage.events("left"), why=stage.said)
        else:
            happen(None)
        stop.go()
    stage.see_through()
    for timer in after:
        timer.cancel()


def assert_struck(fault: str, stage: Stage) -> None:
    """The fault has been felt as it should be, and no more."""
    sessions = sum(event["client"] == "client1" for event in stage.events("joined"))
    ended = [name for name, _ in stage.ended]
    if fault in _HARMLESS:
        assert (sessions, ended) == (1, []), "these are nothing to end a session for"
    elif "disk full" in fault:
        assert ended[0] == ("server" if fault == "disk full" else "client1")
    elif fault == "server failed":
        assert (ended[0], stage.starts("server")) == ("server", 2)
        assert stage.starts("client0") == 1, "who had a session waits"
    elif "killed" in fault:
        assert stage.starts(fault.split()[0].replace("client", "client1")) == 2
    else:
        assert sessions >= 2 or "client1" in ended, "client 1 lost its session, or did not get it"
