"""Who takes part in a soak: the server and its lives, a relay before each client, a process that holds most clients, and some
clients that are processes of their own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.relay import free_port
from splitfl.checkpoint import checkpoint_steps
from splitfl.commands.log import LogFiles
from splitfl.protocol.join import JoinString
from splitfl.protocol.keys import read_identity
from splitfl.sample import build_sample_model, sample_text
from tests.faults.processes import Process, clock
from tests.faults.relay import Relay
from tests.faults.stage import wait_until
from tests.faults.words import flags, serve, write_keys
from tests.soak.crowd import Orders
from tests.soak.disks import Disk, broken

__all__ = ["APART", "CLIENTS", "DEADLINE", "Life", "Site"]

#: Clients; how many of them are processes of their own, which are killed.
CLIENTS, APART = 16, 4
#: Seconds for which a step waits for who is late.
DEADLINE = 6.0
_CHECKPOINT_EVERY = 10
#: MiB of the disks: some hours of log and a few checkpoints; the ends of a visit.
_SERVERS_DISK, _CLIENTS_DISK = 64, 8
#: Seconds that a client that is a process of its own is away, between two runs of so many steps.
_AWAY, _STAYS = (1.0, 10.0), (30, 150)


@dataclass
class Life:
    """One process of the server: ``begun`` and ``ended`` in seconds of the wall clock; ``no_room``: it said that its disk was
    full, and it was.
    """

    pid: int
    begun: float
    ended: float = 0.0
    code: int | None = None
    no_room: bool = False

    @property
    def ended_well(self) -> bool:
        return self.code in (0, -9) or self.no_room


class Site:
    """Everything of one soak lies in ``work``."""

    def __init__(self, work: Path, seed: int) -> None:
        work.mkdir(parents=True)
        (work / "said").mkdir()
        self.work, self._draw = work, random.Random(f"site {seed}")
        self._model = str(work / "model")
        build_sample_model(self._model, seed=0, hidden=32, blocks=4, context=64)
        self._texts = self._write_texts()
        names = [f"client{index}" for index in range(CLIENTS)]
        self._keys = write_keys(work, names)
        self._ports = free_port(), free_port()
        self.relays = {name: Relay(*self._ports, host=f"127.0.1.{number}") for number, name in enumerate(names, 1)}
        self.apart, self._together = names[:APART], names[APART:]
        self.clocks = {name: clock() for name in self.apart}  # by how much each is wrong
        self.disks = {name: Disk(work / name, _CLIENTS_DISK) for name in self.apart}
        self.disks["server"] = Disk(work / "server", _SERVERS_DISK)
        self.broken: list[str] = []  # checkpoints that were left behind
        self.lives: list[Life] = []
        self.endings: list[dict[str, Any]] = []  # of the clients that are processes of their own
        self.server: Process | None = None
        self.crowd: subprocess.Popen[bytes] | None = None
        self._processes: dict[str, Process] = {}
        self._visits: dict[str, int] = dict.fromkeys(self.apart, 0)
        self._starts = 0
        self._log: LogFiles | None = None  # of the server, read up to its last step
        self._last_step = 0.0  # when it was made, seconds of the wall clock
        self._next: dict[str, float] = dict.fromkeys(self.apart, 0.0)  # when it comes again

    def _write_texts(self) -> list[Path]:
        text = sample_text()
        pieces = {"held-out": text[:1500], "crowd": text[1500:60_000]}
        pieces |= {f"apart{index}": text[60_000 + 8000 * index :][:8000] for index in range(APART)}
        files = {name: self.work / f"{name}.txt" for name in pieces}
        for name, file in files.items():
            file.write_text(pieces[name], encoding="utf-8")
        return list(files.values())

    # --- the server -------------------------------------------------------------------------------------------------------------

    def start_server(self) -> None:
        words = {
            "clients": 4,
            "run": "soak",
            "threads": 1,
            "on-loss": "drop",
            "step-deadline": DEADLINE,
            "checkpoint-every": _CHECKPOINT_EVERY,
            "status-every": 2,
        }
        self.server = self._start(serve(self.work, self._model, self._ports, words), "server", heap=self.work / "heap.jsonl")
        self.lives.append(Life(self.server.pid, time.time()))

    def end_server(self, how: str) -> None:
        """``how``: killed, or asked to stop; returns once it is gone."""
        assert self.server is not None
        if how == "killed":
            self.server.kill()
        else:
            self.server.ask_to_stop()
        deadline = time.monotonic() + 60
        while self.server.code is None:
            assert time.monotonic() < deadline, f"the server that was {how} does not end"
            time.sleep(0.05)
        self.note_end()

    @property
    def is_up(self) -> bool:
        return self.server is not None and self.server.code is None

    @property
    def has_no_room(self) -> bool:
        """Whether the server has ended by itself, as its disk was full."""
        return self.server is not None and self.disks["server"].explains(self.server)

    def note_end(self) -> None:
        """The server has ended."""
        assert self.server is not None
        life = self.lives[-1]
        life.ended, life.code, life.no_room = time.time(), self.server.code, self.disks["server"].explains(self.server)
        self._look_behind(self.work / "server")
        self.server = None

    def _look_behind(self, run: Path) -> None:
        """What is left of ``run`` by a process that has ended."""
        self.broken += [problem for problem in broken(run) if problem not in self.broken]

    @property
    def has_made_a_step(self) -> bool:
        """Whether the server that is there has."""
        self._log = self._log or LogFiles(self._log_file)
        for event in self._log.read():
            if event["event"] == "step":
                self._last_step = event["time"]
        return self._last_step > self.lives[-1].begun

    def connections(self) -> int:
        """Connections of the server that stand."""
        assert self.server is not None
        return sum(one.status == psutil.CONN_ESTABLISHED for one in psutil.Process(self.server.pid).net_connections("tcp"))

    def listening(self) -> int:
        """Listeners at the server's ports, those of the relays included."""
        found = psutil.net_connections("tcp")
        return sum(one.status == psutil.CONN_LISTEN and one.laddr.port in self._ports for one in found)

    def events(self) -> list[dict[str, Any]]:
        return list(LogFiles(self._log_file).read()) if self._log_file.exists() else []

    @property
    def _log_file(self) -> Path:
        return self.work / "server" / "log.jsonl"

    def diary(self) -> list[dict[str, Any]]:
        return _lines(self.work / "diary.jsonl")

    def heap(self, pid: int) -> list[tuple[float, float]]:
        """What a process had in use of its heap: (seconds of the wall clock, MiB)."""
        return [(line["time"], line["mib"]) for line in _lines(self.work / "heap.jsonl") if line["pid"] == pid]

    # --- the clients ------------------------------------------------------------------------------------------------------------

    def _join(self, name: str) -> str:
        key = read_identity(self.work / "server.key").public
        host = f"127.0.1.{1 + list(self.relays).index(name)}"
        return str(JoinString(key, host, self._ports[0], "soak"))

    def start_crowd(self, seed: int) -> None:
        members = [(name, self._join(name), str(self._keys[name])) for name in self._together]
        held_out, text = (str(file) for file in self._texts[:2])
        diary, heap, end = (str(self.work / name) for name in ("diary.jsonl", "heap.jsonl", "end"))
        orders = Orders(self._model, text, held_out, members, diary, heap, end, seed)
        file = self.work / "orders.json"
        file.write_text(json.dumps(dataclasses.asdict(orders)))
        said = (self.work / "said" / "crowd.txt").open("wb")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, "-m", "tests.soak.crowd", str(file)]
        self.crowd = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        said.close()

    def end_crowd(self) -> None:
        """It is told; it has ended once its process has."""
        (self.work / "end").touch()

    def tend(self, *, more: bool = True) -> None:
        """Look after the clients that are processes of their own: note how each ended, and start it again (``more``) or not."""
        for name in self.apart:
            process = self._processes.get(name)
            if process is not None and process.code is None:
                continue
            if process is not None:
                self._note(name, process)
            elif more and time.monotonic() >= self._next[name]:
                self._processes[name] = self._train(name)

    def _note(self, name: str, process: Process) -> None:
        last = process.said.strip().splitlines()[-1:]
        disk = self.disks[name]
        no_room = disk.explains(process)
        ending = {"time": time.time(), "client": name, "code": process.code, "said": last[0] if last else "", "no_room": no_room}
        self.endings.append(ending | {"traceback": "Traceback" in process.said, "full_for": disk.full_for})
        self._look_behind(self._ends(name))
        del self._processes[name]
        self._next[name] = time.monotonic() + self._draw.uniform(*_AWAY)
        if not no_room and process.code != -9:  # who was killed, or found no room, goes on with what it kept; others begin anew
            shutil.rmtree(self._ends(name), ignore_errors=True)
            self._visits[name] += 1

    def _ends(self, name: str) -> Path:
        """Where a client that is a process of its own keeps its ends."""
        return self.work / name / f"ends{self._visits[name]}"

    def _train(self, name: str) -> Process:
        out = self._ends(name)
        words = {
            "trunk": self._join(name),
            "identity": self._keys[name],
            "model": self._model,
            "data": self._texts[2 + self.apart.index(name)],
            "device": "cpu",
            "out": out,
            "ends": "full",
            "max-length": 32,
            "batch-size": 2,
            "evaluate": 0,
            "seed": self._visits[name],
            "steps": self._draw.randrange(*_STAYS),
            "reconnect": 120,
            "timeout": 6,
        }
        resume = ["--resume"] if checkpoint_steps(out) else []
        return self._start(["train", *flags(words), *resume], name, clock=self.clocks[name])

    def kill(self, name: str) -> bool:
        """kill -9 a client that is a process of its own; False where it is away."""
        process = self._processes.get(name)
        if process is not None:
            process.kill()
        return process is not None

    @property
    def is_empty(self) -> bool:
        """Whether no client is a process any more."""
        return not self._processes and self.crowd is not None and self.crowd.poll() is not None

    def _start(self, words: list[str], name: str, **options: Any) -> Process:
        self._starts += 1
        return Process(words, self.work / "said" / f"{name}.{self._starts}.txt", **options)

    def close(self) -> None:
        processes = [*self._processes.values(), *([self.server] if self.server is not None else [])]
        for process in processes:
            process.kill()
        wait_until(lambda: all(process.code is not None for process in processes))
        if self.crowd is not None and self.crowd.poll() is None:
            self.crowd.kill()
            self.crowd.wait()
        for relay in self.relays.values():
            relay.close()
        for disk in self.disks.values():
            disk.close()


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]] if file.exists() else []
