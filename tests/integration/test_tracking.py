"""What TensorBoard shows of a client's training is what its log says; a Trainer on a split model reports as on the whole one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorboard")

from transformers import AutoModelForCausalLM

from client_ends.train import TrainSettings, train
from splitfl.cli import main
from splitfl.runlog import RunLog
from splitfl.sample import build_sample_model, sample_text
from tests.events import scalars
from tests.integration.test_trainer import RUN, trainer_of
from tests.world import World, running, tiny_llama

SECRET = "nobody-elses"


@pytest.fixture
def world(tmp_path: Path) -> Any:
    build_sample_model(tmp_path / "model", seed=0, hidden=32, blocks=4)
    with running(World(tmp_path, str(tmp_path / "model"), 1)) as world:
        yield world


def run(world: World, **changes: Any) -> list[dict[str, Any]]:
    """Train; returns what the client's log says of it."""
    data = world.work / f"{SECRET}.txt"
    data.write_text(sample_text()[:4000], encoding="utf-8")
    settings = {"max_length": 32, "batch_size": 4, "evaluate": 8, "evaluate_every": 2, "device": "cpu", "model": world.model}
    where = {"trunk": world.join, "identity": str(world.keys[0]), "data": str(data), "out": str(world.work / "ends")}
    log = RunLog(world.work / "ends" / "log.jsonl", echo=None)
    try:
        train(TrainSettings(**(settings | where | changes)), log=log, channel_options=world.channel_options())
    finally:
        log.close()
    return [json.loads(line) for line in (world.work / "ends" / "log.jsonl").read_text().splitlines()]


def as_logged(events: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events:
        kind = {"step": "train", "evaluation": "eval"}.get(event["event"])
        apart = {"time", "event", "step", "when", "made", "targets"} - ({"targets"} if kind == "eval" else set())
        for name in event.keys() - apart if kind else ():
            if event[name] is not None:
                at = event["step"] + 1 if kind == "train" else event["made"]
                found.setdefault(f"{kind}/{name}", []).append((at, event[name]))
    return found


def assert_shown(world: World, events: list[dict[str, Any]]) -> None:
    shown, logged = scalars(world.work / "ends" / "tensorboard"), as_logged(events)
    assert shown.keys() == logged.keys()
    for name, figures in logged.items():
        assert [step for step, _ in shown[name]] == [step for step, _ in figures], name
        assert [value for _, value in shown[name]] == pytest.approx([value for _, value in figures], rel=1e-6), name


def test_what_is_shown_is_what_was_logged_and_no_more(world: World) -> None:
    events = run(world, steps=5)
    assert_shown(world, events)
    shown = scalars(world.work / "ends" / "tensorboard")
    wanted = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds_waiting", "bytes_sent", "bytes_received")
    assert {f"train/{name}" for name in wanted} | {"eval/loss"} <= shown.keys()
    assert [step for step, _ in shown["train/loss"]] == [1, 2, 3, 4, 5]
    assert [step for step, _ in shown["eval/loss"]] == [0, 2, 4, 5]
    seconds = zip(shown["train/seconds_waiting"], shown["train/seconds"], strict=True)
    assert all(0 <= waited <= whole + 1e-3 for (_, waited), (_, whole) in seconds)
    assert sum(waited for _, waited in shown["train/seconds_waiting"]) > 0
    # Of each step's 4 x 31 tokens or so, a hidden state and a gradient leave.
    assert all(value > 2 * 32 * 4 * 80 for _, value in shown["train/bytes_sent"])
    files = [file for file in (world.work / "ends" / "tensorboard").rglob("*") if file.is_file()]
    written = b"".join(file.read_bytes() for file in files)
    assert b"batch_size" in written
    for secret in (SECRET, world.join[-60:], world.keys[0].name, sample_text()[:40]):
        assert secret.encode() not in written


def test_a_run_that_is_taken_up_goes_on_in_the_same_log(world: World) -> None:
    run(world, steps=3)
    events = run(world, steps=6, resume=True)
    assert_shown(world, events)
    assert [step for step, _ in scalars(world.work / "ends" / "tensorboard")["train/loss"]] == [1, 2, 3, 4, 5, 6]


def test_none_writes_none_and_a_wrong_name_is_one_sentence(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    run(world, steps=1, report_to="none")
    assert not (world.work / "ends" / "tensorboard").exists()
    words = ["--trunk", world.join, "--identity", str(world.keys[0]), "--data", str(world.work / f"{SECRET}.txt")]
    assert main(["train", *words, "--out", str(world.work / "other"), "--report-to", "nothing"]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert "--report-to nothing" in said


def test_a_trainer_reports_what_it_reports_of_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(tmp_path / "model")
    shown = {}
    with running(World(tmp_path, model, 1, **RUN)) as world:
        split = world.join_as(0)
        for name, used in (("whole", AutoModelForCausalLM.from_pretrained(model)), ("split", split)):
            monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / name))
            trainer_of(used, tmp_path / f"out-{name}", report_to="tensorboard").train()
            shown[name] = scalars(tmp_path / name)
        split.close()
    assert shown["split"].keys() == shown["whole"].keys()
    for name in ("train/loss", "train/grad_norm", "train/learning_rate", "eval/loss"):
        steps, values = zip(*shown["whole"][name], strict=True)
        assert [step for step, _ in shown["split"][name]] == list(steps)
        assert [value for _, value in shown["split"][name]] == pytest.approx(values, rel=1e-5, abs=1e-12)
