"""splitfl top: from a log that grows, and from an endpoint; one sentence where there is nothing to show."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from rich.console import Console

from server_trunk.members import Member
from server_trunk.meter import Meter
from server_trunk.prometheus import MetricsEndpoint
from splitfl.cli import main
from splitfl.commands.top import _Log, frame
from splitfl.protocol.messages import Forward


def measured(tokens: int = 12) -> Meter:
    meter = Meter(100)
    for client in ("client10", "client2"):
        meter.joined(f"{client}-session", client)
    forward = Forward(0, 0, ((tokens, 0),), 4, "float32", "raw", True, True, True)
    meter.ran("forward", [Member("client2-session", forward, None, "client2")], began=meter._clock(), seconds=0.1)
    meter.step_closed([("client2", tokens, False), ("client10", 0, True)])
    return meter


def line(event: str, **fields) -> str:
    return json.dumps({"time": 1.0, "event": event, **fields}) + "\n"


def shown(status, note: str = "now", width: int = 80) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(frame(status, note))
    return console.export_text().splitlines()


def test_a_frame_fits_a_terminal_of_eighty_columns():
    lines = shown(measured().snapshot())
    text = "\n".join(lines)
    assert "2 session(s), step 1" in lines[0]
    assert "…" not in text
    rows = [row.split() for row in lines if row.startswith(("client", "all"))]
    assert [row[0] for row in rows] == ["client", "client2", "client10", "all"]
    assert rows[1][2] == rows[3][2] == "12"
    assert (rows[1][-2:], rows[2][-2:], rows[3][-2:]) == (["1", "0"], ["1", "1"], ["1", "1"])


def test_what_was_not_measured_is_a_dash():
    assert "-" in shown(Meter(100).snapshot())[1]


def test_the_newest_status_of_a_log_is_shown_also_while_it_grows(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(line("serving") + line("status", **measured(5).snapshot()) + '{"event": "sta')
    source = _Log(tmp_path)
    status, note = source.read()
    assert status is not None
    assert status["tokens"] == 5
    assert note.endswith("s ago")
    with log.open("a") as file:
        file.write('tus"}\n' + line("status", **measured(7).snapshot()) + line("stopped", why="the end"))
    status, note = source.read()
    assert status is not None
    assert (status["tokens"], note) == (7, "stopped: the end")


def test_of_a_long_log_the_end_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr("splitfl.commands.top._TAIL", 4000)
    (tmp_path / "log.jsonl").write_text(
        "".join(line("step", step=step) for step in range(1000)) + line("status", **measured(7).snapshot())
    )
    status, _ = _Log(tmp_path).read()
    assert status is not None
    assert status["tokens"] == 7


def test_once_prints_one_frame_of_a_run_and_of_an_endpoint(tmp_path, capsys):
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "log.jsonl").write_text(line("status", **measured().snapshot()))
    endpoint = MetricsEndpoint("0", measured())
    endpoint.start()
    try:
        for source in (tmp_path, endpoint.url, f"{endpoint.url}/metrics"):
            assert main(["top", str(source), "--once"]) == 0
            assert "client10" in capsys.readouterr().out
    finally:
        endpoint.stop()


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("missing", "missing holds no log.jsonl"),
        ("empty", "no status line yet"),
        ("http://127.0.0.1:9", "no live numbers at http://127.0.0.1:9/status.json"),
    ],
)
def test_nothing_to_show_is_one_sentence(tmp_path, monkeypatch, capsys, source, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "log.jsonl").write_text(line("serving"))
    assert main(["top", source, "--once"]) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert len(said.err.strip().splitlines()) == 1


def test_it_does_not_wait_for_torch(tmp_path):
    (tmp_path / "log.jsonl").write_text(line("status", **measured().snapshot()))
    script = (
        f"import sys\nfrom splitfl.cli import main\nmain(['top', {str(tmp_path)!r}, '--once'])\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, stdout=subprocess.DEVNULL).returncode == 0
