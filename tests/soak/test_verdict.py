"""Whether the verdict on a soak says no where it should: to a ledger, a life of the server, an ending, an event."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from splitfl.checkpoint import checkpoint_directory, put_aside, save_checkpoint
from splitfl.errors import NotWritten
from tests.faults.disk import NO_ROOM
from tests.soak import disks
from tests.soak.disks import Disk, broken
from tests.soak.faults import Faults
from tests.soak.site import Life
from tests.soak.verdict import applied_once, endings, for_want_of_room, is_busy, stuck, went_on


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    """One that nothing is mounted on, or written to."""
    monkeypatch.setattr(disks, "mount", lambda place, mib: True)
    monkeypatch.setattr(disks, "fill", lambda place: None)
    monkeypatch.setattr(disks, "free", lambda place: None)
    return Disk(tmp_path / "disk", 1)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the wall clock of disks."""
    return lambda seconds: monkeypatch.setattr(disks, "time", SimpleNamespace(time=lambda: seconds))


# --- what was applied -----------------------------------------------------------------------------------------------------------


def step(number: int, targets: int, *, client: str = "a", time: float = 0.0) -> dict[str, Any]:
    parts = {f"{client}/0": {"targets": targets}}
    return {"event": "step", "step": number, "time": time or float(number), "seconds": 1.0, "parts": parts}


def sends(number: int, targets: int, client: str = "a") -> dict[str, Any]:
    return {"what": "sends", "client": client, "step": number, "targets": targets}


GAP = {"event": "log-gap", "lines": 1, "time": 1.5}


@pytest.mark.parametrize(
    ("ledger", "events", "problem"),
    [
        ([10, 20, 30], [step(0, 10), step(1, 20), step(2, 30)], ""),
        ([10, 20, 30], [step(0, 10), step(1, 99), step(1, 20), step(2, 30)], ""),
        ([10, 20, 30], [step(0, 10), GAP, step(2, 30)], ""),
        ([10, 20, 30], [step(0, 10), step(2, 30)], "steps of the ledger are not in the log"),
        ([10, 20, 30], [step(0, 10), GAP], "steps of the ledger are not in the log"),
        # The second life began with step 1: what the first made of it and of step 2 is undone.
        ([10, 20, 30], [step(0, 10), step(1, 20), step(2, 30), step(1, 20)], "steps of the ledger are not in the log"),
        ([10, 20, 30], [step(0, 10), step(1, 19), step(2, 30)], "step 1: the ledger has {'a': 20}, the log {'a': 19}"),
        ([10, 20, 30], [step(0, 10), step(1, 20, client="b"), step(2, 30)], "step 1: the ledger has"),
        ([10, 20, 31], [step(0, 10), step(1, 20), step(2, 31)], "step 2: 31 targets of a, which sent 30"),
        ([10, 21, 30], [step(0, 10), GAP, step(2, 30)], "step 1: 21 targets of a, which sent 20"),
    ],
)
def test_what_the_ledger_has_is_held_against_the_log_and_what_was_sent(ledger, events, problem):
    entries = [(number, {"a": targets}) for number, targets in enumerate(ledger)]
    diary = [sends(0, 10), sends(1, 12), sends(1, 8), sends(2, 30), {"what": "made", "client": "a", "step": 2}]
    found = applied_once(entries, events, diary)
    assert len(found) == bool(problem)
    assert all(each.startswith(problem) for each in found)


def test_a_step_that_the_ledger_lacks_is_seen():
    assert applied_once([(0, {}), (2, {})], [step(0, 0), step(2, 0)], []) == ["the ledger's steps are not one after the other"]


# --- lives of the server --------------------------------------------------------------------------------------------------------


def made(time: float) -> dict[str, Any]:
    return {"what": "made", "client": "a", "step": 1, "time": time}


@pytest.mark.parametrize(
    ("ended", "no_room", "diary", "problem"),
    [
        (140.0, False, [], ""),
        (160.0, False, [], "no step closed for 60 s"),
        (160.0, False, [made(130.0)], "no step closed for 60 s"),
        (160.0, True, [made(130.0)], ""),  # its log found no room either
        (160.0, True, [made(101.0), made(161.0)], "no step closed for 59 s"),
    ],
)
def test_a_server_that_neither_steps_nor_ends_is_seen(ended, no_room, diary, problem):
    lives = [Life(1, 90.0, ended, -9, no_room), Life(2, 200.0, 900.0, 0)]
    events = [step(0, 1, time=100.0), step(1, 1, time=210.0)]
    assert stuck([], lives, events, diary) == [problem] * bool(problem)
    assert stuck([(110.0, 120.0)], lives, events, diary) == []


@pytest.mark.parametrize("no_room", [True, False])
def test_a_server_that_goes_on_with_a_full_disk_is_seen(no_room):
    lives = [Life(1, 0.0, 90.0, 2, True), Life(2, 100.0, 200.0, 2 if no_room else 0, no_room)]
    full = {"what": "disk full", "client": "server", "time": 150.0, "at": 140.0}
    assert went_on([full | {"until_end": False}, {"what": "link cut"}], lives) == []
    found = went_on([full | {"until_end": True}], lives)
    assert found == ([] if no_room else ["the server whose disk was full from 140 s on did not end for it"])


def test_whether_clients_have_a_server():
    lives = [Life(1, 0.0, 50.0), Life(2, 60.0, 90.0)]
    assert [at for at in (5.0, 10.0, 50.0, 55.0, 65.0, 70.0, 91.0) if is_busy(at, lives)] == [10.0, 50.0, 70.0]


# --- endings --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "said", "explained"),
    [
        (2, f"cannot be written ({NO_ROOM}): make room", True),
        (2, f"note\ncannot be written ({NO_ROOM}): make room", True),
        (2, f"cannot be written ({NO_ROOM})\nno session was opened", False),
        (2, "no session was opened", False),
        (2, "", False),
        (1, f"cannot be written ({NO_ROOM}): make room", False),
        (None, f"cannot be written ({NO_ROOM}): make room", False),
    ],
)
def test_an_end_for_want_of_room_says_so_while_there_is_none(disk, now, code, said, explained):
    ended: Any = SimpleNamespace(code=code, said=said)
    now(1000.0)
    assert not disk.explains(ended)
    disk.fill()
    for at, is_full in ((1000.0, True), (1300.0, True), (1301.0, False), (1319.0, False)):
        now(at)
        assert disk.explains(ended) == explained
        if not is_full:
            disk.free()
    now(1322.0)
    assert not disk.explains(ended), "it was full until 1301, and is to say so within 20 s"


@pytest.mark.parametrize(
    ("event", "is_so"),
    [
        ({"event": "log-gap", "lines": 3}, True),
        ({"event": "failed", "error": f"{NotWritten.__name__}: the checkpoint cannot be written"}, True),
        ({"event": "failed", "error": "RuntimeError: no room"}, False),
        ({"event": "checkpoint-damaged", "error": NotWritten.__name__}, False),
    ],
)
def test_only_some_events_are_for_want_of_room_and_only_while_there_is_none(disk, now, event, is_so):
    now(1000.0)
    disk.fill()
    now(1010.0)
    disk.free()
    found = [for_want_of_room(event | {"time": at}, disk) for at in (999.0, 1000.0, 1029.0, 1031.0)]
    assert found == [False, is_so, is_so, False]


ENDING = {"client": "client0", "code": 0, "said": "", "no_room": False, "traceback": False, "full_for": 0.0}


@pytest.mark.parametrize(
    ("ending", "problem"),
    [
        ({}, ""),
        ({"code": -9}, ""),
        ({"code": 2, "said": "nothing listens at 127.0.0.1"}, ""),
        ({"code": 2, "said": NO_ROOM, "no_room": True}, ""),
        ({"code": 2, "said": NO_ROOM}, f"client0 ended with 2: {NO_ROOM}"),
        ({"code": 2, "said": "no such file"}, "client0 ended with 2: no such file"),
        ({"code": 1, "said": "nothing listens at 127.0.0.1"}, "client0 ended with 1: nothing listens at 127.0.0.1"),
        ({"traceback": True}, "client0 ended with 0: "),
        ({"full_for": 29.0}, ""),
        ({"full_for": 31.0}, "client0 ended well with a disk that was full for 31 s"),
        ({"full_for": 31.0, "code": -9}, ""),
    ],
)
def test_an_ending_that_nothing_explains_is_seen(ending, problem):
    assert endings([ENDING | ending], []) == [problem] * bool(problem)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"what": "left"}, ""),
        ({"what": "could not join", "error": "no session was opened: why"}, ""),
        ({"what": "could not join", "error": "the model is another"}, "a could not join: the model is another"),
        ({"what": "lost", "error": "SessionLost: why"}, "a: lost: SessionLost: why"),
        ({"what": "failed", "error": "KeyError: 3"}, "a: failed: KeyError: 3"),
    ],
)
def test_what_befell_a_client_is_seen_in_the_diary(line, problem):
    assert endings([], [{"client": "a"} | line]) == [problem] * bool(problem)


def test_a_checkpoint_that_cannot_be_read_is_seen_wherever_it_was_put(tmp_path):
    for number in (1, 2, 3):
        save_checkpoint(checkpoint_directory(tmp_path, number), {"weight": torch.zeros(3)}, {})
    assert broken(tmp_path) == broken(tmp_path / "nothing there") == []
    put_aside(checkpoint_directory(tmp_path, 1), "damaged")
    (checkpoint_directory(tmp_path, 2) / "trainables.safetensors").write_bytes(b"")
    (checkpoint_directory(tmp_path, 3) / "checkpoint.json").unlink()
    assert [part for part in ("put aside", "is damaged", "is no checkpoint") for each in broken(tmp_path) if part in each] == [
        "put aside",
        "is damaged",
        "is no checkpoint",
    ]


# --- faults ---------------------------------------------------------------------------------------------------------------------


def test_what_frees_a_disk_does_not_free_it_of_what_fills_it_later(disk):
    first = disk.fill()
    disk.free()
    second = disk.fill()
    first()
    assert disk.is_full
    second()
    assert not disk.is_full


class Nobody:
    """A site where disks are all there is; ``ended``: how the server has."""

    def __init__(self, disk: Disk) -> None:
        self.disks, self.relays, self.apart = {"server": disk}, {"client0": self}, ["client0"]
        self.clocks = {"client0": SimpleNamespace(value=0.0)}
        self.endings: list[dict[str, Any]] = []
        self.has_made_a_step, self.has_no_room = True, False
        self.ended: list[str] = []

    def at(self, *_: Any) -> None:
        """Of a relay, as what follows."""

    cut = stall = throttle = heal = at

    def kill(self, name: str) -> bool:
        return False

    def start_server(self) -> None:
        self.has_no_room = False

    def end_server(self, how: str) -> None:
        self.ended.append(how)

    def note_end(self) -> None:
        self.ended.append("found no room")


def test_a_servers_disk_is_full_once_until_it_ends_by_itself(disk):
    """And nothing else ends it meanwhile."""
    site = Nobody(disk)
    site.disks["client0"] = SimpleNamespace(is_small=False, is_full=False)  # type: ignore[assignment]
    faults = Faults(site, 600.0, 0)  # type: ignore[arg-type]

    def fills() -> list[bool]:
        return [fault["until_end"] for fault in faults.done if fault["what"] == "disk full"]

    second = 0
    while not fills():
        faults.turn(float(second := second + 1))
    ended = len(site.ended)
    for _ in range(600):
        faults.turn(float(second := second + 1))
    assert fills() == [True]
    assert disk.is_full
    assert len(site.ended) == ended < 3
    site.has_no_room = True
    for _ in range(600):
        faults.turn(float(second := second + 1))
    assert fills() == [True, False, False, False]
    assert not disk.is_full
    assert site.ended[ended] == "found no room"
    assert [how for how in site.ended if how != "found no room"] == ["killed", "asked to stop", "killed"]


def test_a_clients_disk_may_be_full_until_it_ends(disk):
    site = Nobody(SimpleNamespace(is_small=False, is_full=False))  # type: ignore[arg-type]
    site.disks["client0"] = disk
    site.has_made_a_step = False
    faults = Faults(site, 600.0, 0)  # type: ignore[arg-type]
    second = 0
    while not any(fault.get("until_end") for fault in faults.done):
        assert second < 3600
        faults.turn(float(second := second + 1))
    for _ in range(60):
        faults.turn(float(second := second + 1))
    assert disk.is_full
    site.endings.append({"client": "client0", "time": faults.done[-1]["time"] + 1e6})
    faults.turn(float(second))  # at which nothing else befalls it any more
    assert not disk.is_full
