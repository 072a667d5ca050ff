"""`serve` with one trunk on two ranks: a real client trains, the run goes on otherwise spread, a rank dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from splitfl.checkpoint import checkpoint_directory, checkpoint_steps, in_shards, load_tensors
from splitfl.cli import main
from splitfl.protocol.keys import write_identity
from splitfl.sample import build_sample_model
from tests.unit.channel_world import wait_until

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--")


class Served:
    """A run's directory, its one client's key, and servers and clients as processes."""

    def __init__(self, work: Path, model: str) -> None:
        self.work, self.model = work, model
        self.key = work / "client.key"
        self.started: list[subprocess.Popen[str]] = []
        (work / "authorized_clients").write_text(f"{write_identity(self.key).public} client\n")

    def serve(self, name: str, *settings: object, ranks: bool = True) -> tuple[subprocess.Popen[str], str]:
        """The server, and its join string once it serves; ``ranks``: under a torchrun of the operator's."""
        words = (
            "server_trunk",
            "serve",
            self.model,
            "--clients",
            1,
            "--run",
            "test",
            "--out",
            self.work / name,
            "--device",
            "cpu",
        )
        options = ("--authorized-clients", self.work / "authorized_clients", "--lr", "1e-2", "--eps", "1e-3", "--until-done")
        command = [sys.executable, *(RANKS if ranks else ("-m",)), *map(str, (*words, *options, *settings))]
        server = self._start(command)
        assert server.stdout is not None
        for line in server.stdout:
            if line.strip().startswith("splitfl://"):
                return server, line.strip()
        raise AssertionError(server.communicate()[1])

    def train(self, join: str, name: str, steps: int) -> None:
        client = self.start_training(join, name, steps)
        _, said = client.communicate(timeout=100)
        assert client.returncode == 0, said

    def start_training(self, join: str, name: str, steps: int) -> subprocess.Popen[str]:
        command = ("train", "--trunk", join, "--identity", self.key, "--model", self.model, "--data", self.work / "rows.jsonl")
        more = ("--device", "cpu", "--out", self.work / name, "--max-length", 24, "--batch-size", 4, "--evaluate", 0)
        words = [sys.executable, "-m", "splitfl.cli", *map(str, (*command, *more, "--steps", steps))]
        return self._start(words)

    def _start(self, words: list[str]) -> subprocess.Popen[str]:
        self.started.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT))
        return self.started[-1]

    def end(self) -> None:
        """Whatever a test that failed has left; torchrun ends its own."""
        for process in self.started:
            if process.poll() is None:
                process.terminate()
                process.communicate()

    def events(self, name: str, kind: str) -> list[dict]:
        lines = (self.work / name / "log.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]


def finish(server: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = server.communicate(timeout=60)
    return server.returncode, said


def losses(served: Served, name: str) -> list[float]:
    return [event["loss"] for event in served.events(name, "step")]


@pytest.fixture
def served(tmp_path) -> Iterator[Served]:
    build_sample_model(tmp_path / "model", seed=0, hidden=32, blocks=4, heads=4)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    rows = [{"text": " ".join(words[index % 5 :: 1 + index % 3])} for index in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    made = Served(tmp_path, str(tmp_path / "model"))
    yield made
    made.end()


@pytest.mark.slow  # the ranks alone are under test in test_sharding.py
def test_a_client_is_served_as_by_one_process(served):
    server, join = served.serve("sharded", "--shard", "tensor", "--shard-size", 2, ranks=False)
    served.train(join, "ends", 2)
    assert finish(server)[0] == 0
    alone, join = served.serve("alone", ranks=False)
    served.train(join, "ends-alone", 2)
    assert finish(alone)[0] == 0
    assert losses(served, "ends") == pytest.approx(losses(served, "ends-alone"), rel=1e-5)
    assert_same_run(served, "sharded", "alone", 2)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["tensor", "fsdp"])
def test_a_text_is_written_as_by_the_whole_model(served, shard, capsys):
    """With key-value caches on both ranks, proposals that are taken back among what they hold."""
    server, join = served.serve("sharded", "--shard", shard, "--shard-size", 2, ranks=False)
    joining = ("--trunk", join, "--identity", served.key, "--model", served.model, "--device", "cpu", "--max-new-tokens", 40)
    texts = []
    for lookup in (0, 4):
        assert main(["generate", "the quick brown the quick", *map(str, joining), "--lookup", str(lookup)]) == 0
        texts.append(capsys.readouterr().out.strip())
    assert not served.events("sharded", "no-caches")
    tokenizer, whole = AutoTokenizer.from_pretrained(served.model), AutoModelForCausalLM.from_pretrained(served.model).eval()
    ids = tokenizer("the quick brown the quick", return_tensors="pt").input_ids
    found = whole.generate(ids, max_new_tokens=40, do_sample=False)[0]
    assert texts == [tokenizer.decode(found, skip_special_tokens=True).strip()] * 2
    served.train(join, "ends", 1)  # which ends the server
    assert finish(server)[0] == 0


@pytest.mark.slow
def test_a_run_goes_on_spread_otherwise(served):
    """Two steps tensor-parallel, one by two fully sharded replicas, one by one process; against the same by one process."""
    whole = ("--shard", "none", "--shard-size", 1)
    spread = {
        "sharded": (
            ("--shard", "tensor", "--shard-size", 2),
            ("--shard", "fsdp", "--shard-size", 2, "--mode", "hierarchical", "--replicas", 2),
            whole,
        ),
        "alone": (whole,) * 3,
    }
    for name, parts in spread.items():
        for part, settings in enumerate(parts):
            again = ("--resume",) if part else ()
            server, join = served.serve(name, "--trainables", "full", "--checkpoint-keep", 9, *settings, *again, ranks=False)
            served.train(join, f"{name}{part}", 2 if part == 0 else 1)
            assert finish(server)[0] == 0
    assert_same_run(served, *spread, 4)
    steps = checkpoint_steps(served.work / "sharded")
    assert [in_shards(checkpoint_directory(served.work / "sharded", step)) for step in steps] == [True, True, False]
    assert_same_results(served, *spread, steps[1])


@pytest.mark.slow
def test_a_checkpoint_in_shards_that_is_damaged_is_passed_over(served):
    settings = ("--shard", "fsdp", "--shard-size", 2, "--trainables", "full", "--checkpoint-every", 1)
    server, join = served.serve("sharded", *settings, ranks=False)
    served.train(join, "ends", 5)
    assert finish(server)[0] == 0
    assert checkpoint_steps(served.work / "sharded") == [2, 3, 4]  # older ones are gone, with all their files
    newest, before = (checkpoint_directory(served.work / "sharded", step) for step in (4, 3))
    part = newest / "exp_avg" / "shard-00002-model-00001-of-00001.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    (before / "trainables" / part.name).unlink()
    assert main(["export", str(served.work / "sharded"), str(served.work / "result")]) == 2
    server, join = served.serve("sharded", *settings, "--resume", ranks=False)
    served.train(join, "again", 1)
    assert finish(server)[0] == 0
    said = [event["error"] for event in served.events("sharded", "checkpoint-damaged")]
    assert "exp_avg/shard-00002" in said[0]
    assert "is missing" in said[1]
    assert served.events("sharded", "resumed")[-1]["step"] == 2
    assert served.events("sharded", "step")[-1]["step"] == 3


def assert_same_run(served: Served, one: str, other: str, steps: int) -> None:
    norms = [[event["grad_norm"] for event in served.events(name, "step")] for name in (one, other)]
    assert len(norms[0]) == steps
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert_same_results(served, one, other, steps - 1)


def assert_same_results(served: Served, one: str, other: str, step: int) -> None:
    exported = []
    for name in (one, other):
        result = served.work / f"{name}-{step}"
        assert main(["export", str(served.work / name), str(result), "--step", str(step)]) == 0
        (file,) = result.glob("*.safetensors")
        exported.append(load_tensors(file))
    assert exported[0].keys() == exported[1].keys()
    assert all(float((mine - exported[1][key]).norm()) <= 1e-5 * float(mine.norm()) for key, mine in exported[0].items())


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_server_with_a_clear_error(served):
    server, join = served.serve("sharded", "--shard", "fsdp", "--shard-size", 2, "--checkpoint-every", 2)
    client = served.start_training(join, "ends", 500)
    wait_until(lambda: len(served.events("sharded", "step")) >= 4, 60)
    (follower,) = [p for p in psutil.Process(server.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
    follower.send_signal(signal.SIGKILL)
    code, said = finish(server)
    client.terminate()
    client.communicate()
    assert code != 0
    (failed,) = served.events("sharded", "failed")
    assert "another rank of this trunk is gone" in failed["error"]
    assert "SIGKILL" in said  # torchrun's own report
    # What no rank can vouch for is not kept: the last checkpoint stands.
    last = served.events("sharded", "checkpoint")[-1]["step"]
    assert checkpoint_steps(served.work / "sharded")[-1] == last
    server, join = served.serve("sharded", "--shard", "fsdp", "--shard-size", 2, "--resume")
    served.train(join, "again", 1)
    assert finish(server)[0] == 0
    assert served.events("sharded", "step")[-1]["step"] == last + 1


@pytest.mark.slow
def test_a_rank_that_hangs_is_taken_for_dead_and_all_start_again(served):
    settings = ("--shard", "fsdp", "--shard-size", 2, "--checkpoint-every", 2, "--max-silence", 3)
    server, join = served.serve("sharded", *settings, ranks=False)
    client = served.start_training(join, "ends", 12)
    wait_until(lambda: len(served.events("sharded", "step")) >= 4, 60)
    (follower,) = [p for p in psutil.Process(server.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
    follower.send_signal(signal.SIGSTOP)
    _, said = client.communicate(timeout=240)  # the agent gives the rank 30 s more
    assert client.returncode == 0, said
    assert finish(server)[0] == 0
    assert len(served.events("sharded", "resumed")) == 1
    assert "silent for 3 s" in served.events("sharded", "failed")[0]["error"]
    assert served.events("sharded", "step")[-1]["step"] == 11
