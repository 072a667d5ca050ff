"""splitfl simulate: the numbers of real processes, from one process; how data is dealt out, and what it refuses."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from benchmarks.simulate import deal
from client_ends.data import load_examples
from splitfl.cli import main
from splitfl.errors import DataError
from tests.forks import splitfl

SHARED = ("--lr", "3e-3", "--steps", "5", "--device", "cpu", "--threads", "1")
ENDS = ("--ends", "full", "--max-length", "48", "--batch-size", "3", "--evaluate", "4")


def losses(directory: Path) -> list[float]:
    """Of every step and evaluation a client logged."""
    events = map(json.loads, (directory / "log.jsonl").read_text().splitlines())
    return [event["loss"] for event in events if event["event"] in ("step", "evaluation")]


@pytest.fixture(scope="module")
def text(data, tmp_path_factory) -> Path:
    """Sixty kilobytes of text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((data / "text" / "tinyshakespeare" / "input.txt").read_text()[:60_000])
    return path


def test_its_losses_are_those_of_real_processes(tmp_path, stories, text, capsys):
    simulated = tmp_path / "simulated"
    words = ("simulate", stories, "--clients", "2", "--data", text, "--out", simulated, "--trainables", "full", *SHARED, *ENDS)
    assert main([*map(str, words), "--json"]) == 0
    said = capsys.readouterr().out
    result = json.loads(said.splitlines()[-1])
    assert [client["name"] for client in result["clients"]] == ["client-0", "client-1"]
    assert result["run"]["steps"] == 5

    keys = simulated / "keys"
    server = splitfl(
        *("serve", stories, "--clients", 2, "--trainables", "full", "--out", tmp_path / "server", "--until-done", *SHARED),
        *("--authorized-clients", keys / "authorized_clients"),
    )
    join = next((line.strip() for line in server.stdout if line.strip().startswith("splitfl://")), None)
    assert join, server.stderr.read()
    clients = [
        splitfl(
            *("train", "--trunk", join, "--identity", keys / f"client-{client}.key", "--model", stories, "--steps", 5),
            *("--data", simulated / "data" / f"client-{client}.txt", "--out", tmp_path / f"real-{client}", "--seed", client),
            *("--device", "cpu", "--threads", 1, *ENDS),
        )
        for client in range(2)
    ]
    try:
        for client in clients:
            _, err = client.communicate(timeout=120)
            assert client.returncode == 0, err
        server.communicate(timeout=60)
    finally:
        for process in (*clients, server):
            process.kill()
            process.wait()
    for client in range(2):
        mine, real = losses(simulated / f"client-{client}"), losses(tmp_path / f"real-{client}")
        assert len(mine) == len(real) == 7
        assert mine == pytest.approx(real, rel=1e-5)
        assert result["clients"][client]["losses"] == mine[1:-1]
    assert losses(simulated / "client-0") != losses(simulated / "client-1")


def test_ctrl_c_ends_it_cleanly(tmp_path, stories, text):
    process = splitfl(
        *("simulate", stories, "--clients", 2, "--data", text, "--out", tmp_path / "run", "--device", "cpu", "--epochs", 1000),
        *("--max-length", 32, "--evaluate", 0),
    )
    log, deadline = tmp_path / "run" / "server" / "log.jsonl", time.monotonic() + 60
    while not (log.exists() and '"step"' in log.read_text()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "splitfl simulate: stopped" in err
    assert "Traceback" not in err
    for part in ("server", "client-0", "client-1"):
        assert list((tmp_path / "run" / part / "checkpoints").glob("step-*")), f"{part} kept nothing"


def test_a_client_that_cannot_go_on_ends_the_run_with_its_sentence(tmp_path, stories, capsys):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.jsonl"
    good.write_text("Once upon a time there was a cat.\n" * 50)
    bad.write_text('{"text": 3}\n')
    words = ["simulate", stories, "--clients", "2", "--data", good, "--data", bad, "--out", tmp_path / "run", "--device", "cpu"]
    assert main([*map(str, words), "--max-length", "16"]) == 2
    said = capsys.readouterr().err
    assert "bad.jsonl" in said
    assert "Traceback" not in said


# --- data -----------------------------------------------------------------------------------------------------------------------


def settings(**given) -> dict:
    return {"columns": None, "data_format": None, "num_labels": None, "label_names": None} | given


def test_a_text_is_cut_between_lines_into_like_parts(tmp_path):
    path = tmp_path / "text.txt"
    lines = [f"line {number} {'x' * (number % 17)}\n" for number in range(500)]
    path.write_text("".join(lines))
    files = deal(path, 3, tmp_path / "data", own := settings())
    parts = [file.read_text() for file in files]
    assert "".join(parts) == "".join(lines)
    assert all(part.endswith("\n") for part in parts)
    assert max(map(len, parts)) - min(map(len, parts)) < 60
    assert own["data_format"] == "txt"


def test_rows_are_dealt_out_in_turn_under_their_fields_names(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\n"a, ""quoted""\nrow",1\nb,2\nc,3\nd,4\ne,5\n')
    own = settings(columns={"prompt": "question", "completion": "answer"})
    files = deal(path, 2, tmp_path / "data", own)
    rows = [load_examples(file, columns=own["columns"], format=own["data_format"]).rows for file in files]
    assert [[row["completion"] for row in part] for part in rows] == [["1", "3", "5"], ["2", "4"]]
    assert rows[0][0]["prompt"] == 'a, "quoted"\nrow'


def test_all_clients_number_the_labels_alike(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "t", "label": label}) + "\n" for label in ("no", "yes", "perhaps", "no")))
    deal(path, 2, tmp_path / "data", own := settings())
    assert own["label_names"] == ("no", "perhaps", "yes")
    path.write_text("".join(json.dumps({"text": "t", "label": label}) + "\n" for label in (0, 1, 0, 4)))
    deal(path, 2, tmp_path / "data", own := settings())
    assert (own["label_names"], own["num_labels"]) == (None, 5)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.txt"])
def test_too_little_data_is_said(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"text": "one"}\n')
    with pytest.raises(DataError, match="holds too little for 3 clients"):
        deal(path, 3, tmp_path / "data", settings())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--clients", "3", "--data", "a.txt", "--data", "a.txt"], "2 data files for 3 clients"),
        (["--clients", "2", "--data", "missing.txt"], "no such file"),
        (["--clients", "1", "--data", "a.txt", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--clients", "1", "--data", "a.txt", "--out", "."], ". is not empty"),
        (["--data", "a.txt", "--mode", "hierarchical", "--replicas", "2"], "one process with one trunk"),
        (["--data", "a.txt", "--shard", "fsdp", "--shard-size", "2"], "one process with one trunk"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a\n")
    assert main(["simulate", "m", *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert len(said.strip().splitlines()) == 1
