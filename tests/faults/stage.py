"""One run of two clients for a fault to befall: a server, a client that nothing happens to, and one behind the relay.

Whoever is killed is started again at once, as its supervisor would; whoever ends with an error only where the cell expects it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.relay import free_port
from server_trunk.run_ledger import RunLedger
from splitfl.checkpoint import checkpoint_steps, load_checkpoint, newest_checkpoint
from splitfl.packed_state import unpack_state
from splitfl.protocol.join import JoinString
from splitfl.protocol.keys import read_identity
from tests.faults import relay as relays
from tests.faults.processes import Process, Stop
from tests.faults.relay import Relay
from tests.faults.words import flags, serve, write_keys

__all__ = ["STEPS", "Stage", "wait_until"]

STEPS = 5
_LONGEST = 150.0
#: Under ``drop`` the others may have made all steps before a client is back.
_TOO_LATE = f"has made its {STEPS} steps"


def wait_until(true: Callable[[], Any], seconds: float = 60.0, why: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited in vain\n{why()}"
        time.sleep(0.01)


class Stage:
    """``on_loss``: the run's. ``expects``: who may end with an error, and is started again: a part of the sentence by its name
    (``server``, ``client0``, ``client1``).
    """

    def __init__(self, work: Path, model: str, texts: list[Path], on_loss: str, *, expects: dict[str, str] | None = None) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work, self._model, self._texts, self._on_loss = work, model, texts, on_loss
        self.expects = expects or {}
        self.codes: dict[str, int] = {}  # the exit code of such an end, where it is not that of a user's mistake
        self.stops: dict[str, Stop] = {}
        self.clocks: dict[str, Any] = {}
        self.before_again: Callable[[str], None] = lambda name: None  # what is mended before somebody is started again
        self.ended: list[tuple[str, str]] = []  # who ended with an error, and its last words
        self._keys = write_keys(work, ["client0", "client1"])
        self._ports = free_port(), free_port()
        self.relay = Relay(*self._ports)
        self._processes: dict[str, Process] = {}
        self._starts: dict[str, int] = {}
        self._late: set[str] = set()
        self._failure = work / "failure"

    # --- who is there -----------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        self.start("server")
        wait_until(lambda: self.events("serving"), why=self.said)
        self.start("client0")
        wait_until(lambda: self.events("joined"), why=self.said)
        self.start("client1")

    def start(self, name: str) -> None:
        """Anew, or again."""
        number = self._starts[name] = self._starts.get(name, 0) + 1
        words = self._serve() if name == "server" else self._train(int(name[-1]))
        stop = self.stops.get(name) if number == 1 else None
        diary = None if name == "server" else self.work / f"diary{name[-1]}"
        said = self.work / f"{name}.{number}.txt"
        self._processes[name] = Process(words, said, stop=stop, clock=self.clocks.get(name), diary=diary, failure=self._failure)

    def _serve(self) -> list[str]:
        words = {
            "clients": 2,
            "run": "test",
            "eps": 1e-6,
            "steps": STEPS,
            "on-loss": self._on_loss,
            "step-deadline": 0,
            "checkpoint-every": 1,
        }
        return serve(self.work, self._model, self._ports, words, "--until-done")

    def _train(self, index: int) -> list[str]:
        key = read_identity(self.work / "server.key").public
        words = {
            "trunk": JoinString(key, relays.HOST if index else "127.0.0.1", self._ports[0], "test"),
            "identity": self._keys[f"client{index}"],
            "model": self._model,
            "data": self._texts[index],
            "device": "cpu",
            "out": self.work / f"ends{index}",
            "ends": "full",
            "max-length": 32,
            "batch-size": 2,
            "evaluate": 0,
            "seed": index,
            "steps": STEPS,
            "timeout": 4,
        }
        resume = ["--resume"] if checkpoint_steps(self.work / f"ends{index}") else []
        return ["train", *flags(words), *resume]

    def kill(self, name: str) -> None:
        """kill -9; :meth:`see_through` starts it again."""
        self._processes[name].kill()

    def fail_server(self) -> None:
        """Its trunk fails at the next message; :meth:`see_through` starts it again."""
        self._failure.touch()

    def see_through(self) -> None:
        """Until all have ended well; whoever was killed, or ends as the cell expects, is started again."""
        deadline = time.monotonic() + _LONGEST
        while any(process.code != 0 for name, process in self._processes.items() if name not in self._late):
            assert time.monotonic() < deadline, f"the run does not end\n{self.said()}"
            for name, process in list(self._processes.items()):
                # Who starts a client again looks first whether it could join.
                in_vain = name == "client1" and self.relay.is_cut
                if process.code not in (None, 0) and name not in self._late and not in_vain:
                    self._again(name, process)
            time.sleep(0.02)

    def _again(self, name: str, process: Process) -> None:
        if process.code is not None and process.code > 0:
            last = process.said.strip().splitlines()[-1:]
            words = last[0] if last else ""
            may = [self.expects[name]] if name in self.expects else []
            may += [_TOO_LATE] if self._on_loss == "drop" and name != "server" else []
            assert may, f"{name} ended\n{self.said()}"
            assert process.code == self.codes.get(name, 2), f"{name} ended with {process.code}\n{self.said()}"
            assert any(part in words for part in may), f"{name} said {words!r}\n{self.said()}"
            assert "Traceback" not in process.said, self.said()
            self.ended.append((name, words))
            if _TOO_LATE in words:
                self._late.add(name)
                return
        assert self._starts[name] < 6, f"{name} ends again and again\n{self.said()}"
        self.before_again(name)
        self.start(name)

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
        self.relay.close()

    def starts(self, name: str) -> int:
        """How often it was started."""
        return self._starts[name]

    # --- what came of it --------------------------------------------------------------------------------------------------------

    def events(self, kind: str) -> list[dict[str, Any]]:
        file = self.work / "server" / "log.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("}\n") and line.startswith("{")]
        return [event for event in found if event["event"] == kind]

    def said(self) -> str:
        """All that everybody said, for whoever looks into a failure."""
        parts = [f"--- {file.name}\n{file.read_text()[-4000:]}" for file in sorted(self.work.glob("*.txt"))]
        log = self.work / "server" / "log.jsonl"
        return "\n".join([*parts, "--- log.jsonl", log.read_text()[-6000:] if log.exists() else ""])

    def weights(self) -> dict[str, dict[str, torch.Tensor]]:
        """Of the newest checkpoints: ``server``, ``ends0``, ``ends1``; without a side that has kept nothing."""
        sides = ("server", "ends0", "ends1")
        return {side: self._newest(side)[0] for side in sides if checkpoint_steps(self.work / side)}

    def ledger(self) -> list[tuple[int, dict[str, int]]]:
        return RunLedger.from_state(unpack_state(self._newest("server")[2]["ledger"])).entries()

    def _newest(self, side: str) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, bytes]]:
        newest = newest_checkpoint(self.work / side)
        assert newest is not None
        return load_checkpoint(newest)
