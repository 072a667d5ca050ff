"""Replicas under several agents of torchrun's, as on several machines: a process dies, then a machine is replaced."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from benchmarks.relay import free_port
from tests.integration.test_equality import TRUNK, assert_equal, story_batches, train_central
from tests.integration.test_replica_kills import KEPT, ledger_of
from tests.integration.test_replicas import train
from tests.replicas import ENVIRONMENT, Replicas
from tests.unit.channel_world import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 12
#: What a machine is called; rank 0 is that whose name comes first.
MACHINES = ("127.0.0.1", "localhost")


class Machines(Replicas):
    """An agent and a process each, all on this machine: the first machine is the one that keeps the rendezvous."""

    def __init__(self, work: Path, model: str, clients: int, **settings) -> None:
        super().__init__(work, model, len(MACHINES), clients, **settings)
        self._meet = f"127.0.0.1:{free_port()}"
        self.agents: list[subprocess.Popen[str]] = []

    def start(self, *_: str) -> None:
        self._errors = (self.work / "stderr").open("w")
        self.agents = [self.agent(machine) for machine in range(len(MACHINES))]
        self.process = self.agents[0]
        self._read_join()

    def agent(self, machine: int) -> subprocess.Popen[str]:
        words = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={self._meet}", "--rdzv-id=trial"]
        words += [f"--rdzv-conf=is_host={int(machine == 0)}", f"--local-addr={MACHINES[machine]}", "--max-restarts=3"]
        words += ["-m", "--", "server_trunk", self.model]
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words, *self.words[1:], f"--bind=127.0.0.1:{free_port()}"],
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=ENVIRONMENT | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )

    def worker(self, machine: int) -> psutil.Process:
        """Once it is there."""
        agent = psutil.Process(self.agents[machine].pid)
        wait_until(lambda: bool(agent.children()), 60)
        return agent.children()[0]

    def stop(self, *, seconds: float = 60) -> int:
        for agent in self.agents:
            if agent.poll() is None:
                agent.send_signal(signal.SIGTERM)
        try:
            for agent in self.agents:
                agent.wait(seconds)
        finally:
            for agent in self.agents:
                agent.kill()
                agent.stdout.close()
            self._errors.close()
        # torchrun's own code says that it was ended by a signal, and nothing of how its process ended.
        return 0 if all(self.ended_well(replica) for replica in range(len(MACHINES))) else 1

    def ended_well(self, replica: int) -> bool:
        """Of the processes that were it one after another, the last."""
        kinds = [event["event"] for event in self.log(replica)]
        if "resumed" in kinds:
            kinds = kinds[-1 - kinds[::-1].index("resumed") :]
        return "stopped" in kinds and "failed" not in kinds


class Accelerated(Replicas):
    """Started by ``accelerate launch``."""

    def start(self, *_: str) -> None:
        plain = ("--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0")
        super().start("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", *plain, "-m", "server_trunk")

    def stop(self, *, seconds: float = 120) -> int:
        """It ends by itself, as SIGTERM would be a failure to torchrun."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return super().stop()


def test_accelerate_starts_replicas(tmp_path, data, stories):
    batches = story_batches(data, 3, steps=4)
    server = Accelerated(tmp_path, stories, 2, 3, "--until-done", trainables="lora", **TRUNK)
    mine = train(server, batches)
    start, theirs = train_central(server, batches, "lora")
    assert_equal(mine, theirs, start)
    assert all(server.events("joined", replica) for replica in range(2))


@pytest.mark.parametrize("replaced", [False, True])
def test_a_process_that_dies_and_a_machine_that_is_replaced_change_nothing(tmp_path, data, stories, monkeypatch, replaced):
    monkeypatch.setattr("client_ends.retrying._MOST", 0.5)  # seconds between attempts
    batches = story_batches(data, 3, steps=STEPS)
    server = Machines(tmp_path, stories, 3, trainables="lora", **KEPT, **TRUNK)

    def disturb() -> None:
        log = server.out / "log.jsonl"
        wait_until(lambda: log.exists() and any(event["step"] >= 2 for event in server.events("checkpoint")), 400)
        lost = server.worker(1)
        if replaced:
            server.agents[1].kill()
            server.agents[1].communicate()
            wait_until(lambda: not lost.is_running(), 60)
            server.agents[1] = server.agent(1)
        else:
            os.kill(lost.pid, signal.SIGKILL)

    disturber = threading.Thread(target=disturb)
    disturber.start()
    mine = train(server, batches)
    disturber.join()
    start, theirs = train_central(server, batches, "lora")
    assert_equal(mine, theirs, start)
    assert [step for step, _ in ledger_of(server.out)] == list(range(STEPS))
    assert len(server.events("resumed")) == 1
