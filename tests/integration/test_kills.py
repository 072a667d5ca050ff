"""Real processes killed, and links cut, at random moments: the run ends with the weights of the undisturbed one.

The moments are drawn by seed; what the machine makes of them differs each time. Every run has to end as the undisturbed one.
"""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
import torch

from benchmarks.link import Link
from benchmarks.relay import free_port
from server_trunk.run_ledger import RunLedger
from splitfl.checkpoint import load_checkpoint, newest_checkpoint
from splitfl.packed_state import unpack_state
from tests.forks import Forked, splitfl
from tests.integration.test_commands import Run, finish

pytestmark = pytest.mark.slow

STEPS = 25


class Killed(Run):
    """A run that can be killed and started again at its ports; clients come through a link that can be cut."""

    def __init__(self, work: Path, model: str, text: Path, *settings: object) -> None:
        work.mkdir(exist_ok=True)
        self.ports = [free_port() for _ in range(4)]
        control, data, near_control, near_data = self.ports
        self.settings = (
            *("--bind", f"127.0.0.1:{control}", "--data-port", data, "--advertise", f"127.0.0.1:{near_data}"),
            *("--step-deadline", 0, "--eps", 1e-6, "--steps", STEPS, "--checkpoint-every", 1, *settings),
        )
        super().__init__(work, model, 2, *self.settings)
        self.join = self.join.replace(f":{control}/", f":{near_control}/")
        self.join = self.join[: self.join.index("@") + 1] + self.join[self.join.index("@") + 1 :].replace(
            self.join[self.join.index("@") + 1 : self.join.rindex(":")], "127.0.0.1"
        )
        self.text, self.link = text, Link({near_control: control, near_data: data})

    def serve_again(self, resume: str = "--resume") -> None:
        self.server = splitfl(
            *("serve", self.model, "--clients", 2, "--run", "test", "--out", self.work / "server", "--device", "cpu", resume),
            *("--authorized-clients", self.work / "authorized_clients", "--lr", "1e-3", *self.settings),
        )

    def train(self, index: int, *options: object) -> Forked:
        return self.client(index, self.text, "--evaluate", 0, "--seed", index, "--ends", "full", "--steps", STEPS, *options)

    def cut(self) -> None:
        self.link.close()
        control, data, near_control, near_data = self.ports
        self.link = Link({near_control: control, near_data: data})

    def wait_for_step(self, step: int, event: str = "checkpoint") -> None:
        """Until it is kept, or, by another ``event`` of the log, made."""
        deadline = time.monotonic() + 120
        while not any(each["step"] >= step for each in self.events("server", event)):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def close(self) -> None:
        super().close()
        self.link.close()


def short_text(directory: Path, data: Path) -> Path:
    """A text that is read and tokenised at once."""
    file = directory / "short.txt"
    file.write_text((data / "text" / "tinyshakespeare" / "input.txt").read_text()[:20000])
    return file


@pytest.fixture(scope="module")
def text(tmp_path_factory, data) -> Path:
    return short_text(tmp_path_factory.mktemp("text"), data)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, stories, text) -> Path:
    run = Killed(tmp_path_factory.mktemp("undisturbed"), stories, text, "--until-done")
    try:
        run.end([run.train(index) for index in range(2)])
    finally:
        run.close()
    return run.work


def assert_as_undisturbed(work: Path, reference: Path) -> None:
    for side in ("server", "ends0", "ends1"):
        mine, theirs = (load_checkpoint(newest_checkpoint(each / side)) for each in (work, reference))
        assert mine[1]["step"] == STEPS - 1
        for name in theirs[0]:
            assert torch.allclose(mine[0][name], theirs[0][name], rtol=1e-5, atol=1e-5), (side, name)
    ledgers = [
        RunLedger.from_state(unpack_state(load_checkpoint(newest_checkpoint(each / "server"))[2]["ledger"])).entries()
        for each in (work, reference)
    ]
    assert ledgers[0] == ledgers[1]
    assert [step for step, _ in ledgers[0]] == list(range(STEPS))


def test_a_server_that_is_killed_before_its_first_checkpoint_begins_anew_and_its_clients_with_it(
    tmp_path, stories, text, undisturbed
):
    run = Killed(tmp_path / "run", stories, text, "--on-loss", "wait", "--until-done", "--checkpoint-every", 100)
    try:
        clients = [run.train(index) for index in range(2)]
        run.wait_for_step(4, "step")
        run.server.kill()
        run.server.communicate()
        run.serve_again("--resume-if-any")
        run.end(clients, 180)
    finally:
        run.close()
    assert_as_undisturbed(run.work, undisturbed)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("what", ["server", "server asked", "client", "client and server", "link"])
def test_whatever_is_killed_the_run_ends_as_the_undisturbed_one(tmp_path, stories, text, undisturbed, what, seed):
    moments = random.Random(f"{what}{seed}")
    run = Killed(tmp_path / "run", stories, text, "--on-loss", "wait", "--until-done")
    try:
        clients = [run.train(index) for index in range(2)]
        for begin, end in ((1, 8), (10, 16)):
            run.wait_for_step(moments.randrange(begin, end))
            time.sleep(moments.uniform(0, 0.1))
            if "server" in what:
                if "asked" in what:
                    run.server.send_signal(signal.SIGTERM)
                    assert finish(run.server)[0] == 0
                else:
                    run.server.kill()
                    run.server.communicate()
            if "client" in what:
                clients[1].kill()
                clients[1].communicate()
                clients[1] = run.train(1, "--resume")
            if "server" in what:
                run.serve_again()
            if what == "link":
                run.cut()
        run.end(clients, 180)
    finally:
        run.close()
    assert_as_undisturbed(run.work, undisturbed)
