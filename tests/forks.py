"""Processes that begin with everything imported: forked off one that has imported torch and the rest (multiprocessing's
forkserver).

To import takes longer than most of what is tested; a command that is to start as a user starts it does not come from here.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, TextIO

import peft  # noqa: F401
from transformers import LlamaForCausalLM, LlamaForSequenceClassification  # noqa: F401

# Whatever a command imports only once it runs.
import server_trunk.command
import server_trunk.server  # noqa: F401
from benchmarks.relay import free_port
from splitfl.cli import main

__all__ = ["FORKS", "Forked", "run_ranks", "splitfl"]

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.forks"])


class Forked:
    """``work(*arguments)`` in a process of its own, as far as tests use :class:`subprocess.Popen` with text pipes. Its exit
    code is what ``work`` returns.
    """

    def __init__(self, work: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None) -> None:
        out, its_out = FORKS.Pipe(duplex=False)
        err, its_err = FORKS.Pipe(duplex=False)
        self._process = FORKS.Process(
            target=_begin, args=(its_out, its_err, dict(environment or {}), work, arguments), daemon=True
        )
        self._process.start()
        its_out.close()
        its_err.close()
        self.stdout, self.stderr = _text(out), _text(err)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0.0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that it still says, once it has ended. Raises TimeoutExpired."""
        said = ["", ""]

        def read(index: int, pipe: TextIO) -> None:
            with contextlib.suppress(ValueError):  # read to its end before
                said[index] = pipe.read()

        readers = [threading.Thread(target=read, args=each, daemon=True) for each in enumerate((self.stdout, self.stderr))]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader, pipe in zip(readers, (self.stdout, self.stderr), strict=True):
            reader.join()
            pipe.close()
        return said[0], said[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def splitfl(*words: object, **environment: str) -> Forked:
    """A command as a process; ``environment``: what of it is not as here."""
    return Forked(main, [str(word) for word in words], environment=environment)


def run_ranks(size: int, work: Callable[..., Any], *arguments: Any, seconds: float = 200.0) -> None:
    """``work(*arguments)`` in as many processes, which can meet as those that torchrun has started; all end well."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    numbered = [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    ranks = [Forked(work, *arguments, environment=each) for each in numbered]
    try:
        for rank in ranks:
            _, said = rank.communicate(seconds)
            assert rank.returncode == 0, said[-4000:]
    finally:
        for rank in ranks:
            rank.kill()


def _text(pipe: Connection) -> TextIO:
    handle = os.dup(pipe.fileno())
    pipe.close()
    return os.fdopen(handle, encoding="utf-8")


def _begin(out: Connection, err: Connection, environment: dict[str, str], work: Callable[..., Any], arguments: Any) -> None:
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    out.close()
    err.close()
    # As Python itself begins where these are pipes.
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(environment)
    # What runs these tests in the background has Ctrl-C ignored, which processes inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(work(*arguments))
