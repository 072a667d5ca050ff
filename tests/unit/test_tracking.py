"""Which trackers a client's figures go to, and what becomes of one that fails."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from client_ends.tracking import Tracking, _leave_word_to_callers, trackers_of
from splitfl.errors import ConfigError


class Fake:
    """A tracker that keeps what it is told; ``fails``: in which of its methods it does."""

    requires_logging_directory = False
    fails = ""
    told: list[tuple[int, dict[str, Any]]]

    def __init__(self, project: str, **options: Any) -> None:
        self.options = options

    def start(self) -> None:
        self._may_fail("start")
        type(self).told = []

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        type(self).settings = values  # type: ignore[attr-defined]

    def log(self, values: dict[str, Any], step: int) -> None:
        self._may_fail("log")
        self.told.append((step, values))

    def finish(self) -> None: ...

    def _may_fail(self, where: str) -> None:
        if self.fails == where:
            raise RuntimeError("no key\nset one")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    """It is W&B now, and all that is installed."""
    import accelerate.tracking

    kind = type("Fake", (Fake,), {})
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", kind)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: ["wandb"])
    return kind


def tracking(work: Path, *, is_asked: bool = True) -> tuple[Tracking, list[str]]:
    said: list[str] = []
    return Tracking(("wandb",), work, "trial", {"batch_size": 8}, is_asked=is_asked, note=said.append), said


def test_names(fake: type[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    assert trackers_of("wandb, wandb") == trackers_of("all") == ("wandb",)
    assert trackers_of("none") == trackers_of(None) == ()
    with pytest.raises(ConfigError, match=r"nothing: it is none, all, or of aim, .*tensorboard"):
        trackers_of("nothing")
    with pytest.raises(ConfigError, match=r"not installed: pip install 'splitfl\[tracking\]'"):
        trackers_of("tensorboard")
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard", "wandb"])
    assert trackers_of(None) == ("tensorboard",)


def test_a_run_that_is_taken_up_is_the_same_to_a_tracker(fake: type[Fake], tmp_path: Path) -> None:
    first, _ = tracking(tmp_path)
    first.begin(0)
    first.log(1, {"train/loss": 2.5})
    first.end()
    assert fake.told == [(1, {"train/loss": 2.5})]
    assert fake.settings == {"batch_size": 8}  # type: ignore[attr-defined]
    identity = (tmp_path / "tracking-id").read_text()
    again, _ = tracking(tmp_path)
    again.begin(1)
    assert again._open["wandb"].options["id"] == identity
    anew, _ = tracking(tmp_path)
    anew.begin(0)
    assert anew._open["wandb"].options["id"] != identity


def test_one_that_does_not_start_is_a_mistake_only_where_it_was_asked_for(fake: type[Fake], tmp_path: Path) -> None:
    fake.fails = "start"
    asked, _ = tracking(tmp_path)
    with pytest.raises(ConfigError, match=r"--report-to wandb: RuntimeError: no key$"):
        asked.begin(0)
    by_default, said = tracking(tmp_path, is_asked=False)
    by_default.begin(0)
    by_default.log(1, {"train/loss": 2.5})
    assert said == ["wandb tracks no more: RuntimeError: no key"]


def test_one_that_fails_ends_no_run(fake: type[Fake], tmp_path: Path) -> None:
    mine, said = tracking(tmp_path)
    mine.begin(0)
    fake.fails = "log"
    for step in (1, 2):
        mine.log(step, {"train/loss": 2.5})
    mine.begin(1)
    mine.end()
    assert said == ["wandb tracks no more: RuntimeError: no key"]


def test_one_that_cannot_be_opened_again_ends_no_run(fake: type[Fake], tmp_path: Path) -> None:
    """Where the run goes back amid a training."""
    mine, said = tracking(tmp_path)
    mine.begin(0)
    fake.fails = "start"
    mine.begin(0)
    mine.log(1, {"train/loss": 2.5})
    assert said == ["wandb tracks no more: RuntimeError: no key"]


def test_a_directory_that_cannot_be_written_is_a_mistake_of_the_tracker(fake: type[Fake], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    mine, _ = tracking(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--report-to wandb: .*exists"):
        mine.begin(0)


def test_what_was_told_of_undone_steps_is_hidden(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tests.events import scalars

    for begun, loss in ((0, 3.0), (2, 2.0)):  # the second time from the second step on
        mine = Tracking(("tensorboard",), tmp_path, "trial", {"batch_size": 8, "ends": "lora"}, is_asked=True, note=print)
        mine.begin(begun)
        for made in range(begun + 1, 5):
            mine.log(made, {"train/loss": loss})
        mine.end()
    assert scalars(tmp_path / "tensorboard") == {"train/loss": [(1, 3.0), (2, 3.0), (3, 2.0), (4, 2.0)]}


def test_a_disk_that_is_full_is_said_in_a_line_and_not_by_the_trackers_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    heard: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", heard.append)
    _leave_word_to_callers.cache_clear()
    request.addfinalizer(_leave_word_to_callers.cache_clear)  # its hook goes with the patch
    notes: list[str] = []
    board = Tracking(("tensorboard",), tmp_path, "run", {}, is_asked=False, note=notes.append)
    board.begin(0)

    def full(self: Any, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
        for step in range(1000):
            if notes:
                break
            board.log(step, {"loss": 1.0})
            time.sleep(0.01)
        board.end()
    assert notes == ["tensorboard tracks no more: OSError: [Errno 28] No space left on device"]
    assert not heard

    def fail() -> None:
        raise RuntimeError("of another thread")

    other = threading.Thread(target=fail)
    other.start()
    other.join()
    assert [str(each.exc_value) for each in heard] == ["of another thread"]
