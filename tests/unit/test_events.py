"""The event log: its table, what the server writes, what the README says of it, and how `splitfl log` shows it."""

from __future__ import annotations

import ast
import contextlib
import errno
import io
import json
import re
from pathlib import Path

import pytest

import server_trunk
from splitfl.cli import main
from splitfl.commands.log import LogFiles
from splitfl.errors import ConfigError
from splitfl.events import EVENTS, sentence
from splitfl.runlog import RunLog

README = Path(__file__).resolve().parents[2] / "README.md"


def written() -> dict[str, set[str]]:
    """The events that the server's code writes, with the names of their fields (... for fields that only the run knows)."""
    found: dict[str, set[str]] = {}
    for file in Path(server_trunk.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text())):
            if not isinstance(call, ast.Call) or not call.args or not isinstance(call.args[0], ast.Constant):
                continue
            name = ast.unparse(call.func)
            if name.endswith("log.write") or name == "log":
                fields = found.setdefault(str(call.args[0].value), set())
                fields |= {keyword.arg or "..." for keyword in call.keywords if keyword.arg != "quiet"}
    return found


def test_what_the_server_writes_is_what_the_table_says():
    said = {name: set(event.fields) for name, event in EVENTS.items() if name != "log-gap"}
    assert written() == said


def test_the_readme_has_every_event_with_its_fields():
    rows = re.findall(r"^\| (`[a-z`, -]+`) \| ([^|]+) \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    shown = {name: tuple(fields.strip().split(", ")) for names, fields in rows for name in re.findall(r"`([a-z-]+)`", names)}
    assert {name: shown.get(name) for name in EVENTS} == {name: event.fields for name, event in EVENTS.items()}


@pytest.mark.parametrize("name", EVENTS)
def test_each_sentence_speaks_of_fields_that_there_are(name):
    assert set(re.findall(r"{(\w+)}", EVENTS[name].said)) <= set(EVENTS[name].fields)
    assert "{" not in sentence({"event": name})


def test_a_log_as_a_person_reads_it(tmp_path, capsys):
    log = RunLog(tmp_path / "log.jsonl", echo=None)
    log.write("joined", client="clinic", address="10.0.0.7", session="0123abcd")
    log.write("step", step=0, targets=12, seconds=0.5, parts={"clinic": {}, "lab": {}})
    log.write("left", client="lab", session="4567", why="silent for 20 s", lost=True)
    log.write("refused", who="lab at 10.0.0.8, key k", code="full", why="too many")
    log.write("link", what="a client's own event")
    log.close()
    assert main(["log", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(None, 3)[2:] for line in lines] == [
        ["joined", "clinic has joined from 10.0.0.7"],
        ["left", "lab has left: silent for 20 s"],
        ["refused", "lab at 10.0.0.8, key k was refused (full): too many"],
        ["link", '{"what": "a client\'s own event"}'],
    ]
    assert main(["log", str(tmp_path), "--all", "--client", "lab"]) == 0
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == ["step", "left", "refused"]
    assert main(["log", str(tmp_path / "nothing")]) == 2


def test_a_log_that_grows_is_read_on_and_replicas_are_put_in_order(tmp_path):
    with pytest.raises(ConfigError, match="holds no log"):
        LogFiles(tmp_path)
    for replica in range(2):
        (tmp_path / f"log-{replica}.jsonl").write_text("")
    files = LogFiles(tmp_path)
    assert list(files.read()) == []

    def append(replica: int, text: str) -> None:
        with (tmp_path / f"log-{replica}.jsonl").open("a") as file:
            file.write(text)

    append(1, '{"time": 1.0, "event": "serving"}\n{"time": 3.0, "ev')
    append(0, '{"time": 2.0, "event": "joined"}\nhalf of a li\n[1]\n')
    assert [event["event"] for event in files.read()] == ["serving", "joined"]
    append(1, 'ent": "left"}\n')
    assert [event["event"] for event in files.read()] == ["left"]


class Full(io.RawIOBase):
    """A file on a disk with room for so many bytes more."""

    def __init__(self, room: int) -> None:
        self.room, self.content = room, b""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        taken, self.room = bytes(data[: self.room]), max(0, self.room - len(data))
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.content += taken
        return len(taken)


def test_a_full_disk_ends_no_run_for_the_logs_sake(tmp_path):
    said = io.StringIO()
    log = RunLog(tmp_path / "log.jsonl", echo=said)
    disk = Full(room=70)
    log._file = disk  # type: ignore[assignment]
    for number in range(4):
        log.write("checkpoint", quiet=True, step=number)
    disk.room = 1 << 20
    log.write("checkpoint", quiet=True, step=4)
    assert said.getvalue().count("the log cannot be written") <= 1
    lines = disk.content.split(b"\n")
    whole = []
    for line in lines:
        try:
            whole.append(json.loads(line))
        except ValueError:
            continue
    assert [event.get("step", event.get("lines")) for event in whole] == [0, 3, 4]


@pytest.mark.parametrize("room", range(120))
def test_each_line_stands_in_the_log_once_or_is_counted_once(tmp_path, room):
    """Wherever the disk is full again amid a gap, or the line after it."""
    said = io.StringIO()
    log, disk = RunLog(tmp_path / "log.jsonl", echo=said), Full(room=1 << 20)
    log._file = disk  # type: ignore[assignment]
    for number, left in enumerate((1 << 20, 0, 0, room, 0, 1 << 20, 1 << 20)):
        disk.room = left
        log.write("checkpoint", quiet=True, step=number)
    *lines, after = disk.content.split(b"\n")
    assert all(lines)
    assert after == b""
    events = []
    for line in lines:
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    steps = [event["step"] for event in events if "step" in event]
    assert steps in ([0, 5, 6], [0, 3, 5, 6])
    assert len(steps) + sum(event["lines"] for event in events if event["event"] == "log-gap") == 7
    assert "the log cannot be written (No space left on device): make room" in said.getvalue()


def test_a_line_that_a_process_left_in_part_spoils_none_of_the_next(tmp_path):
    """One that ended while the disk was full."""
    file = tmp_path / "log.jsonl"
    for part in (b'{"time": 1.0, "event": "ch', b""):
        log = RunLog(file, echo=None)
        log.write("checkpoint", step=1)
        log.write("checkpoint", step=2)
        log.close()
        assert [event["step"] for event in LogFiles(tmp_path).read()] == [1, 2] * (1 + (not part))
        with file.open("ab") as handle:
            handle.write(part)
    assert file.read_bytes().count(b"\n") == 5
