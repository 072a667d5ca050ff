"""What a soak's site sees of its processes: steps, and what they leave behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from splitfl.checkpoint import checkpoint_directory, save_checkpoint
from tests.soak.site import Life, Site
from tests.unit.channel_world import linux

pytestmark = linux


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path / "soak", 0)
    yield made
    made.close()


def ended(code: int) -> Any:
    """A process, to its site."""
    return SimpleNamespace(code=code, said="nothing listens at 127.0.0.1")


class SlowToEnd:
    """One that has not yet ended when it is first looked at after it was killed."""

    def __init__(self) -> None:
        self.looks = -1

    @property
    def code(self) -> int | None:
        self.looks += self.looks >= 0
        return -9 if self.looks > 3 else None

    def kill(self) -> None:
        self.looks = 0


def leave_damaged(run: Path) -> None:
    save_checkpoint(checkpoint_directory(run, 7), {"weight": torch.zeros(3)}, {})
    (checkpoint_directory(run, 7) / "trainables.safetensors").write_bytes(b"")


@pytest.mark.parametrize("code", [0, 2, -9])
def test_a_damaged_checkpoint_is_seen_however_the_client_ended_and_once(site: Site, code: int):
    leave_damaged(site._ends("client0"))
    for _ in range(2):
        site._processes["client0"] = ended(code)
        site.tend(more=False)
    assert [(ending["code"], ending["no_room"]) for ending in site.endings] == [(code, False)] * 2
    (problem,) = site.broken
    assert "step-00000007 is damaged" in problem


def test_a_damaged_checkpoint_of_a_server_that_was_killed_is_seen(site: Site):
    leave_damaged(site.work / "server")
    site.server, site.lives = ended(-9), [Life(1, 0.0)]
    site.note_end()
    (problem,) = site.broken
    assert "step-00000007 is damaged" in problem
    assert site.lives[0].ended_well


def test_each_life_of_the_server_is_asked_for_a_step_of_its_own(site: Site):
    log = site.work / "server" / "log.jsonl"

    def write(event: str, time: float, end: str = "\n") -> None:
        with log.open("a") as file:
            file.write(json.dumps({"event": event, "time": time}) + end)

    assert site.events() == []
    site.lives = [Life(1, 10.0)]
    write("serving", 11.0)
    assert not site.has_made_a_step
    write("step", 12.0, end="")
    assert not site.has_made_a_step
    write("", 0.0)  # its end, and rubbish
    assert not site.has_made_a_step
    write("step", 13.0)
    assert site.has_made_a_step
    write("left", 14.0)
    assert site.has_made_a_step
    site.lives.append(Life(2, 20.0))
    assert not site.has_made_a_step
    write("step", 21.0)
    assert site.has_made_a_step
    assert [event["time"] for event in site.events()] == [11.0, 13.0, 14.0, 21.0]


def test_disks_are_let_go_of_once_nobody_writes_there(site: Site, monkeypatch: pytest.MonkeyPatch):
    process: Any = SlowToEnd()
    site._processes["client0"] = process
    looks: list[int] = []
    for disk in site.disks.values():
        monkeypatch.setattr(disk, "close", lambda own=disk.close: (looks.append(process.looks), own()))
    site.close()
    assert looks == [4] * len(site.disks)
