"""A server of several replicas, as its operator starts it: torchrun's agent and one process a replica."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from client_ends.model import SplitModelForCausalLM
from splitfl.checkpoint import checkpoint_directory, checkpoint_steps, load_checkpoint
from splitfl.config import RunConfig, build_config
from splitfl.protocol.keys import write_identity
from splitfl.settings import SETTINGS_BY_KEY

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


class Replicas:
    """``splitfl serve --mode hierarchical``, whose clients are threads of this process."""

    def __init__(self, work: Path, model: str, replicas: int, clients: int, *flags: str, **settings: Any) -> None:
        self.work, self.model, self.out = work, model, work / "server"
        self.keys = [work / f"client{index}.key" for index in range(clients)]
        lines = [f"{write_identity(key).public} client{index}" for index, key in enumerate(self.keys)]
        (work / "authorized_clients").write_text("\n".join(lines) + "\n")
        self.settings = {
            "mode": "hierarchical",
            "run": "trial",
            "replicas": replicas,
            "clients": clients,
            "out": str(self.out),
            "authorized_clients": str(work / "authorized_clients"),
            "device": "cpu",
            "checkpoint_every": 0,
            "threads": 1,
            **settings,
        }
        self._flags = flags
        self.process: subprocess.Popen[str] | None = None
        self.join = ""

    @property
    def config(self) -> RunConfig:
        return build_config({"model": self.model} | self.settings)

    @property
    def words(self) -> list[str]:
        """The server's command line."""
        return [self.model, *(f"{SETTINGS_BY_KEY[key].option}={value}" for key, value in self.settings.items()), *self._flags]

    def start(self, *command: str) -> None:
        """By ``command``, where not by ``splitfl serve``."""
        command = (sys.executable, "-m", *(command or ("splitfl.cli", "serve")), *self.words)
        self._errors = (self.work / "stderr").open("w")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=ENVIRONMENT)
        self._read_join()

    def _read_join(self) -> None:
        """From what the process says, which serves once it does."""
        assert self.process is not None
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip().startswith("splitfl://"):
                self.join = line.strip()
                return
        raise AssertionError(f"no join string: {(self.work / 'stderr').read_text()}")

    def stop(self, *, seconds: float = 60) -> int:
        """Ask it to end, or wait for the end it has come to by itself; returns the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self._errors.close()

    def join_as(self, client: int, **options: Any) -> Any:
        return SplitModelForCausalLM.from_pretrained(self.model, self.join, self.keys[client], device="cpu", **options)

    def weights(self) -> dict[str, torch.Tensor]:
        """Of the newest checkpoint."""
        tensors, _, _ = load_checkpoint(checkpoint_directory(self.out, checkpoint_steps(self.out)[-1]))
        return tensors

    def events(self, kind: str, replica: int = 0) -> list[dict[str, Any]]:
        """What a replica logged of a kind."""
        return [event for event in self.log(replica) if event["event"] == kind]

    def log(self, replica: int = 0) -> list[dict[str, Any]]:
        """All that it logged."""
        name = f"log-{replica}.jsonl" if replica else "log.jsonl"
        return [json.loads(line) for line in (self.out / name).read_text().splitlines()]


@contextlib.contextmanager
def serving(replicas: Replicas) -> Iterator[Replicas]:
    replicas.start()
    try:
        yield replicas
    finally:
        code = replicas.stop()
    assert code == 0, (replicas.work / "stderr").read_text()


class UntilMoved:
    """The steps that so many clients make together, a thread each: until replica 0 has let one of them go, five more, and to the
    end of a round.
    """

    def __init__(self, replicas: Replicas, clients: int, *, most: int = 300) -> None:
        self._replicas, self._barrier, self._most = replicas, threading.Barrier(clients), most
        self._last, self._round = most, replicas.config.round_steps or 1

    def steps(self, client: int) -> Iterator[int]:
        for step in itertools.count():
            self._barrier.wait(100)
            if client == 0 and step and self._last == self._most and self._replicas.events("moved"):
                self._last = -(-(step + 5) // self._round) * self._round
            self._barrier.wait(100)
            if step >= self._last:
                return
            yield step
