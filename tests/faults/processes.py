"""``splitfl`` commands as processes of their own that begin with everything imported, and can be stopped at a place in them.

There are hundreds of them. Only their clocks are shorter than a user's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import client_ends.retrying
import client_ends.train
import splitfl.checkpoint
from client_ends.session import TrunkSession
from server_trunk.trunkloop import TrunkLoop
from splitfl.channel.timing import Timing
from splitfl.cli import main
from tests.faults.heap import note_heap
from tests.forks import FORKS

__all__ = ["FAILURE", "PAUSE", "SILENCE", "Process", "Stop", "clock", "hasten"]

#: Seconds: fields of :class:`Timing`, and the longest pause between two attempts to connect.
SILENCE, PAUSE = 4.0, 1.0
#: What a trunk says that was made to fail.
FAILURE = "as it was told to"
_CLOCKS = {"heartbeat": 0.3, "silence": SILENCE, "flush": 2.0, "linger": 0.5, "overdue": 3.0}


@dataclasses.dataclass(frozen=True)
class Stop:
    """Amid the checkpoint of ``step``, its tensors written and nothing else, the process says that it is there and waits.

    By files: what multiprocessing has waits for ever for a process that was killed.
    """

    step: int
    directory: Path

    @property
    def is_reached(self) -> bool:
        return (self.directory / "reached").exists()

    def go(self) -> None:
        (self.directory / "go").touch()

    def wait(self) -> None:
        """The process's part."""
        (self.directory / "reached").touch()
        while not (self.directory / "go").exists():
            time.sleep(0.005)


class Process:
    """One command; what it says is in ``said``. ``stop``: where it is to stop. ``clock``: a shared number of seconds by which its
    wall clock is wrong. ``diary``: a file for what a client's ends have made of which batch. ``failure``: once there is such a
    file, a trunk fails at the next message that it is to take, and the file is gone. ``heap``: where its heap in use is noted.
    """

    def __init__(
        self,
        words: list[str],
        said: Path,
        *,
        stop: Stop | None = None,
        clock: Any = None,
        diary: Path | None = None,
        failure: Path | None = None,
        heap: Path | None = None,
    ) -> None:
        self._said = said
        arguments = words, str(said), stop, clock, diary, failure, heap
        self._process = FORKS.Process(target=_command, args=arguments, daemon=True)
        self._process.start()

    @property
    def code(self) -> int | None:
        """Its exit code; negative where a signal ended it; None while it runs."""
        return self._process.exitcode

    @property
    def said(self) -> str:
        return self._said.read_text() if self._said.exists() else ""

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def kill(self) -> None:
        """kill -9. From any thread; only one may look at :attr:`code`."""
        self._send(signal.SIGKILL)

    def ask_to_stop(self) -> None:
        """As a supervisor does before it starts a process again."""
        self._send(signal.SIGTERM)

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def clock() -> Any:
    """A wall clock's error, seconds, shared with processes."""
    return FORKS.RawValue("d", 0.0)


def hasten() -> None:
    """Shorter clocks in this process."""
    Timing.__init__.__defaults__ = tuple(_CLOCKS.get(field.name, field.default) for field in dataclasses.fields(Timing))
    client_ends.retrying._MOST = PAUSE


def _command(
    words: list[str],
    said: str,
    stop: Stop | None,
    clock: Any,
    diary: Path | None,
    failure: Path | None,
    heap: Path | None,
) -> None:
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    torch.set_num_threads(1)
    hasten()
    if stop is not None:
        _stop_at(stop)
    if clock is not None:
        right = time.time
        time.time = lambda: right() + clock.value
    if diary is not None:
        _keep_diary(diary)
    if failure is not None:
        _fail_at(failure)
    if heap is not None:
        note_heap(heap)
    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _stop_at(stop: Stop) -> None:
    save = splitfl.checkpoint.save_tensors

    def saved(file: Any, *rest: Any, **options: Any) -> None:
        save(file, *rest, **options)
        if f".step-{stop.step:08d}." in str(file) and not stop.is_reached:
            stop.wait()

    splitfl.checkpoint.save_tensors = saved


def _fail_at(failure: Path) -> None:
    process = TrunkLoop._process

    def processed(self: Any, event: Any) -> None:
        if failure.exists():
            failure.unlink()
            raise RuntimeError(FAILURE)
        process(self, event)

    TrunkLoop._process = processed


def _keep_diary(file: Path) -> None:
    """What this client's ends have made of which batch, a JSON object a line: ``sent`` and ``made`` are steps of the run,
    ``stands`` the one that they go on after.
    """
    with_batch = client_ends.train._Run._step
    send, stand = TrunkSession.send_backward, client_ends.train._Run._stand_at
    diary, drawn = file.open("a", buffering=1), [0]

    def step(self: Any, *rest: Any) -> None:
        drawn[0], before = self.batches.state_dict()["batches_done"], self.last_step
        try:
            with_batch(self, *rest)
        finally:
            if self.last_step != before:  # the optimizer has stepped, whatever is said of it then
                print(json.dumps({"made": self.last_step, "batch": drawn[0]}), file=diary)

    def send_backward(self: Any, number: int, *rest: Any, **options: Any) -> None:
        send(self, number, *rest, **options)
        print(json.dumps({"sent": self._micros[number].step, "batch": drawn[0]}), file=diary)

    def stand_at(self: Any, step: int, place: Any) -> None:
        stand(self, step, place)
        print(json.dumps({"stands": step}), file=diary)

    client_ends.train._Run._step, client_ends.train._Run._stand_at = step, stand_at
    TrunkSession.send_backward = send_backward
