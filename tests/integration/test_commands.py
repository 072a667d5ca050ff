"""The commands as a person uses them: in processes of their own over loopback, killed ones too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.demo import TOLERANCE, verdict
from splitfl.cli import COMMANDS, main
from tests.forks import Forked, splitfl

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def finish(process: subprocess.Popen[str] | Forked, seconds: float = 120) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


class Run:
    """A server process and what its clients need."""

    def __init__(self, work: Path, model: str, clients: int, *settings: object) -> None:
        self.work, self.model = work, model
        self.keys = [work / f"client{index}.key" for index in range(clients)]
        lines = []
        for key in self.keys:
            code, out, _ = finish(splitfl("keygen", key))
            assert code == 0
            lines.append(out.splitlines()[-1])
        (work / "authorized_clients").write_text("\n".join(lines) + "\n")
        self.server = splitfl(
            *("serve", model, "--clients", clients, "--run", "test", "--out", work / "server", "--device", "cpu"),
            *("--authorized-clients", work / "authorized_clients", "--lr", "1e-3", *settings),
        )
        self.join = ""
        for line in self.server.stdout:
            if line.strip().startswith("splitfl://"):
                self.join = line.strip()
                break
        assert self.join, self.server.stderr.read()

    def client(self, index: int, data: Path, *options: object) -> Forked:
        return splitfl(
            *("train", "--trunk", self.join, "--identity", self.keys[index], "--model", self.model, "--data", data),
            *("--device", "cpu", "--out", self.work / f"ends{index}", "--max-length", 64, "--batch-size", 4, *options),
        )

    def events(self, side: str, kind: str) -> list[dict]:
        path = self.work / side / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [event for event in map(json.loads, (line for line in lines if line.endswith("\n"))) if event["event"] == kind]

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 60
        while len(self.events("server", "step")) <= step:
            assert time.monotonic() < deadline
            assert self.server.poll() is None
            time.sleep(0.05)

    def end(self, clients: list[Forked], seconds: float = 120) -> None:
        """All come to their end, and the server by that to its own."""
        for client in clients:
            code, _, err = finish(client, seconds)
            assert code == 0, err
        assert finish(self.server)[0] == 0

    def close(self) -> None:
        if self.server.poll() is None:
            self.server.kill()
        self.server.communicate()


@pytest.fixture(scope="module")
def text(data, tmp_path_factory) -> Path:
    """Sixty kilobytes of it."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((data / "text" / "tinyshakespeare" / "input.txt").read_text()[:60_000])
    return path


def test_what_was_trained_is_what_merge_gives_to_plain_transformers_and_peft(tmp_path, stories, text):
    from peft import PeftModel

    from client_ends.data import Batches, pad_token
    from client_ends.evaluation import evaluate
    from client_ends.train import TrainSettings, read_data

    run = Run(tmp_path, stories, 1, "--until-done")
    try:
        run.end([run.client(0, text, "--steps", 6, "--evaluate", 16, "--ends", "lora")])
    finally:
        run.close()
    for words in (
        ("export", tmp_path / "ends0", tmp_path / "ends"),
        ("export", tmp_path / "server", tmp_path / "trunk"),
        ("merge", tmp_path / "ends", tmp_path / "trunk", tmp_path / "merged"),
    ):
        assert main([str(word) for word in words]) == 0
    before, after = run.events("ends0", "evaluation")
    assert after["loss"] < before["loss"] - 0.1
    tokenizer = AutoTokenizer.from_pretrained(stories)
    settings = TrainSettings(trunk="", identity="", data=str(text), max_length=64, evaluate=16)
    _, held_out = read_data(settings, tokenizer)
    batches = Batches(held_out, 4, seed=0, pad_token_id=pad_token(tokenizer), shuffle=False)
    base = AutoModelForCausalLM.from_pretrained(stories)
    assert evaluate(base, batches, torch.device("cpu"))["loss"] == pytest.approx(before["loss"], rel=1e-5)
    merged = PeftModel.from_pretrained(base, tmp_path / "merged")
    assert evaluate(merged, batches, torch.device("cpu"))["loss"] == pytest.approx(after["loss"], rel=1e-5)


def test_one_client_killed_the_other_goes_on_and_a_stopped_server_says_so(tmp_path, stories, text):
    run = Run(tmp_path, stories, 2)
    try:
        steady, doomed = (run.client(index, text, "--steps", 400, "--evaluate", 0, "--reconnect", 0) for index in range(2))
        run.wait_for_step(3)
        doomed.kill()
        doomed.communicate()
        reached = len(run.events("server", "step"))
        run.wait_for_step(reached + 5)
        assert list(run.events("server", "step")[-1]["parts"]) == ["client0"]
        assert len(run.events("server", "left")) == 1
        run.server.send_signal(signal.SIGTERM)
        assert finish(run.server)[0] == 0
        code, _, err = finish(steady)
        assert code == 1
        assert "the server is stopping" in err
        assert "Traceback" not in err
    finally:
        run.close()
    last = run.events("server", "step")[-1]["step"]
    assert (tmp_path / "server" / "checkpoints" / f"step-{last:08d}" / "checkpoint.json").is_file()
    assert list((tmp_path / "ends0" / "checkpoints").glob("step-*")), "the client kept nothing"


def test_a_classifier_from_a_table(tmp_path, stories, data):
    run = Run(tmp_path, stories, 1, "--until-done")
    try:
        client = run.client(
            *(0, data / "text" / "sst2" / "dev.tsv", "--columns", "text=sentence,label=label"),
            *("--task", "sequence-classification", "--steps", 5, "--evaluate", 0.1),
        )
        run.end([client])
    finally:
        run.close()
    evaluations = run.events("ends0", "evaluation")
    assert [event["when"] for event in evaluations] == ["before", "after"]
    assert all("accuracy" in event for event in evaluations)
    assert [event["targets"] for event in run.events("server", "step")] == [4] * 5


def test_the_demo(tmp_path):
    # As a user begins it, and as it begins its server and clients: nothing is imported before.
    words = [sys.executable, "-m", "splitfl.cli", "demo", "--steps", "3", "--out", str(tmp_path / "demo")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    code, out, err = finish(subprocess.Popen(words, text=True, env=ENVIRONMENT, **pipes), 200)
    assert code == 0, out + err
    assert "The split run equals central training" in out
    assert "of 16 pieces of one hidden state 0 found" in out
    assert "sealing off: 16 of 16 pieces, 3 words" in out
    assert (tmp_path / "demo" / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("worst", "sealed", "code"),
    [(TOLERANCE, True, 0), (TOLERANCE * 1.01, True, 1), (float("nan"), True, 1), (0.0, False, 1)],
)
def test_the_demo_fails_where_it_must(worst, sealed, code):
    assert verdict(worst, sealed)[1] == code


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["serve", "--help"],
        ["train", "--help"],
        ["doctor", "--help"],
        ["demo", "--help"],
        ["simulate", "--help"],
        ["bench", "--help"],
    ],
)
def test_help_does_not_wait_for_torch(words):
    script = (
        "import sys\nfrom splitfl.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, "torch was imported"
    assert "usage: splitfl" in done.stdout


@pytest.mark.parametrize(
    "words", [["train", "--data", __file__], ["eval", "--data", __file__], ["generate", "x"], ["chat"], ["proxy"]]
)
def test_a_join_string_that_is_none_costs_no_import_of_torch(words):
    words = [*words, "--trunk", "splitfl:/x", "--identity", "none", "--model", "none"]
    script = (
        "import sys\nfrom splitfl.cli import main\n"
        f"code = main({words!r})\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules or code != 2)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert "a join string begins with splitfl://" in done.stderr
    assert done.returncode == 0, "torch was imported"


def test_every_command_has_its_module():
    import importlib

    for module, _ in COMMANDS.values():
        found = importlib.import_module(module)
        assert callable(found.add_arguments)
        assert callable(found.run)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["serve", "m", "--clients", "0"], "at least 1"),
        (["serve", "m", "--bind", "nowhere"], "is no HOST:PORT"),
        (["serve", "m", "--host", "trunk.example.org:7100"], "is no name or address by itself"),
        (["serve", "--config", "missing.toml"], "cannot read the config"),
        (["keygen", "a.key", "--name", "two words"], "one word"),
        (["train", "--trunk", "x", "--identity", "k", "--data", "missing.txt"], "no such file"),
        (["train", "--trunk", "x", "--identity", "k", "--data", "d", "--lr", "-1"], "--lr -1: it must be at least 0"),
        (["train", "--trunk", "x", "--identity", "k", "--data", "d", "--epochs", "0"], "--epochs 0: it must be above 0"),
        (["plan", "missing-model-directory/x/y"], "missing-model-directory"),
        (["export", "missing", "out"], "missing"),
        (["merge", "missing", "missing", "out"], "missing"),
        (["doctor", "splitfl://nonsense"], "no @"),
        (["doctor", "splitfl://nonsense", "--revision", "v1"], "give both, or neither"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_two(tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    said = capsys.readouterr()
    assert sentence in said.err + said.out
    assert "Traceback" not in said.err
    assert len((said.err + said.out).strip().splitlines()) == 1


@pytest.mark.slow
def test_a_step_is_held_for_a_killed_client_until_it_is_back(tmp_path, stories, text):
    run = Run(tmp_path, stories, 2, "--on-loss", "wait", "--step-deadline", 0)
    try:
        steady, doomed = (run.client(index, text, "--steps", 400, "--evaluate", 0) for index in range(2))
        run.wait_for_step(2)
        doomed.kill()
        doomed.communicate()
        deadline = time.monotonic() + 60
        while not run.events("server", "left"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        held = len(run.events("server", "step"))
        back = run.client(1, text, "--steps", 3, "--evaluate", 0)
        code, _, err = finish(back)
        assert code == 0, err
        run.wait_for_step(held + 5)
        steps = run.events("server", "step")
        # Every step until the client left of its own will had both; none was made while it was away.
        both = [set(event["parts"]) == {"client0", "client1"} for event in steps]
        assert all(both[: held + 3])
        assert not any(both[held + 3 :])
        assert not any(part["dropped"] for event in steps for part in event["parts"].values())
        steady.kill()
        steady.communicate()
    finally:
        run.close()
