"""A server that is asked to end waits for the open step, and no longer than whoever asks wants it to."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from splitfl.cli import main
from splitfl.errors import NotWritten, SplitflError
from tests.replicas import ENVIRONMENT, Replicas
from tests.rounds_world import batch
from tests.unit.channel_world import wait_until
from tests.world import World, running, tiny_llama


def begin_step(split) -> None:
    """A step is open that its client does not bring to its end."""
    split.train()
    split(**batch(0, 0))


def test_who_hurries_waits_no_longer_for_the_open_step(tmp_path):
    world = World(tmp_path, tiny_llama(tmp_path / "model"), 1)
    with running(world):
        split = world.join_as(0, reconnect=0)
        begin_step(split)
        stop = threading.Thread(target=world.server.stop, kwargs={"back": True, "patience": 1000.0}, daemon=True)
        stop.start()
        wait_until(lambda: world.server._loop._keeper.ending)
        assert stop.is_alive()
        world.server.hurry()
        stop.join(30)
        assert not stop.is_alive()
        split.close()


class Failing:
    """A server whose trunk fails; ``said``: what it is told at its end."""

    said: ClassVar[list[Any]] = []
    join = "splitfl://..."

    def __init__(self, config: Any, **more: Any) -> None:
        pass

    def start(self) -> None:
        pass

    def wait(self, timeout: float) -> bool:
        raise self.error

    def stop(self, text: str, *, back: bool, patience: float) -> None:
        self.said.append((text, back, patience))


@pytest.mark.parametrize(
    "error", [SplitflError("the trunk failed: CUDA error"), NotWritten("no room"), RuntimeError("a mistake")]
)
def test_a_server_that_fails_by_itself_means_to_be_back(tmp_path, monkeypatch, error):
    """So its clients wait until it is started again, as they do for one that was killed."""
    monkeypatch.setattr("server_trunk.server.TrunkServer", Failing)
    monkeypatch.setattr(Failing, "error", error, raising=False)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    Failing.said.clear()
    arguments = ["serve", "model", "--out", str(tmp_path)]
    if isinstance(error, SplitflError):
        assert main(arguments) == error.exit_code
    else:
        with pytest.raises(RuntimeError, match="a mistake"):
            main(arguments)
    assert Failing.said == [("the server has failed", True, 0.0)]


@pytest.mark.slow
def test_a_second_signal_ends_replicas_that_wait_for_a_step(tmp_path: Path, monkeypatch):
    """Which comes to them through torchrun's agent."""
    (tmp_path / "sitecustomize.py").write_text("import server_trunk.command as c\nc.PATIENCE = 1000.0\n")
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setitem(ENVIRONMENT, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "900")
    replicas = Replicas(tmp_path, tiny_llama(tmp_path / "model"), 2, 1)
    replicas.start()
    try:
        split = replicas.join_as(0, reconnect=0)
        begin_step(split)
        assert replicas.process is not None
        replicas.process.send_signal(signal.SIGTERM)
        time.sleep(4)  # one that comes sooner is taken for the same
        assert replicas.process.poll() is None
        assert not replicas.events("stopped")
        replicas.process.send_signal(signal.SIGTERM)
        replicas.process.wait(60)
        assert [len(replicas.events("stopped", replica)) for replica in range(2)] == [1, 1]
        split.close()
    finally:
        replicas.stop()
