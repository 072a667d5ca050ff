"""Where the figures of a training run go beside its log: TensorBoard, W&B, trackio, whatever of these accelerate knows.

What is sent or written is numbers, and settings that are listed here by name: never text, paths, keys or addresses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from splitfl.errors import ConfigError, kind_and_line

__all__ = ["Tracking", "settings_to_track", "trackers_of"]

#: In a client's directory: what W&B and others know the run by, so that one that is taken up goes on in it.
_IDENTITY = "tracking-id"

#: What of a client's settings, and of the run's, stands beside its figures.
_OF_CLIENT = ("task", "ends", "max_length", "batch_size", "accumulate", "epochs", "steps", "micro_batches", "seed")
_OF_RUN = ("run", "cut", "mode", "clients", "trainables", "adapters", "dtype", "round_steps")


def trackers_of(report_to: str | None) -> tuple[str, ...]:
    """The trackers that ``report_to`` names: names joined by commas, ``all`` that are installed, or ``none``. None: TensorBoard
    where it is installed.

    Raises ConfigError where one is unknown, or not installed.
    """
    if report_to == "none":
        return ()
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = [str(each) for each in get_available_trackers()]
    if report_to is None:
        return tuple(name for name in installed if name == "tensorboard")
    if report_to == "all":
        return tuple(installed)
    names = tuple(dict.fromkeys(name.strip() for name in report_to.split(",") if name.strip()))
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(f"--report-to {name}: it is none, all, or of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in installed:
            package = "'splitfl[tracking]'" if name == "tensorboard" else name
            raise ConfigError(f"--report-to {name} is not installed: pip install {package}")
    return names


def settings_to_track(settings: Any, terms: Mapping[str, Any], optimizer: Any) -> dict[str, str | int | float | bool]:
    """What is worth knowing beside the figures, flat: of a client's ``settings``, of the run's ``terms``, and the ends'
    ``optimizer``.
    """
    told = {name: getattr(settings, name) for name in _OF_CLIENT}
    told |= {name: terms[name] for name in _OF_RUN if name in terms}
    told |= {f"lora_{name}": value for name, value in terms["lora"].items() if name != "targets"}
    told |= dataclasses.asdict(optimizer)
    return {name: value for name, value in told.items() if isinstance(value, str | int | float | bool)}


class Tracking:
    """The trackers of one client's training. Figures stand at the number of steps that it had made."""

    def __init__(
        self,
        names: tuple[str, ...],
        out: Path,
        run: str,
        settings: Mapping[str, Any],
        *,
        is_asked: bool,
        note: Callable[[str], None],
    ) -> None:
        """``names``: as of :func:`trackers_of`. ``out``: where those write that write files. ``is_asked``: one that does not
        start is a mistake, before the training. ``note``: hears in one line of one that is done without.
        """
        self._names, self._out, self._run, self._settings = list(names), out, run, dict(settings)
        self._must_start, self._note = is_asked, note
        self._open: dict[str, Any] = {}

    def begin(self, made: int) -> None:
        """Open them for a client that has made ``made`` steps. What was told of later ones, by an earlier process or before the
        run went back, TensorBoard hides; W&B and trackio go on behind it in the same record, and others in a new one.

        Raises ConfigError, the first time: one that cannot be opened again amid a training is done without.
        """
        self.end()
        if not made:
            with contextlib.suppress(OSError):
                (self._out / _IDENTITY).unlink()
        for name in list(self._names):
            try:
                self._open[name] = tracker = self._start(name, made)
                if not made:
                    tracker.store_init_configuration(self._settings)
            except Exception as error:  # whatever a library of others raises
                if self._must_start:
                    raise ConfigError(f"--report-to {name}: {kind_and_line(error)}") from None
                self._do_without(name, error)
        self._must_start = False

    def log(self, made: int, figures: Mapping[str, float]) -> None:
        """Figures as they are after ``made`` steps. A tracker that fails ends no run: it is done without."""
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(dict(figures), step=made)
            except Exception as error:  # a full disk, say
                self._do_without(name, error)

    def end(self) -> None:
        for name, tracker in list(self._open.items()):
            try:
                tracker.finish()
            except Exception as error:
                self._do_without(name, error)
        self._open.clear()

    def _do_without(self, name: str, error: Exception) -> None:
        self._names.remove(name)
        self._open.pop(name, None)
        self._note(f"{name} tracks no more: {kind_and_line(error)}")

    def _start(self, name: str, made: int) -> Any:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # accelerate's trackers log nothing without it
        kind = LOGGER_TYPE_TO_CLASS[name]
        project = os.environ.get("WANDB_PROJECT", "splitfl")
        if name == "tensorboard":
            _leave_word_to_callers()
            # It hides what stands there at this step or later, so that no step is there twice.
            tracker = kind("tensorboard", self._out, purge_step=made + 1 if made else 0)
        elif name == "wandb":
            # Neither what is printed nor the command line, with its paths and the join string, leaves this machine.
            private = {"console": "off", "disable_git": True, "disable_code": True, "x_disable_meta": True}
            tracker = kind(project, name=self._run, id=self._identity(), resume="allow", dir=str(self._out), settings=private)
        elif name == "trackio":
            known_as, resume = f"{self._run}-{self._identity()}", "allow" if made else "never"
            tracker = kind(project, name=known_as, resume=resume, config=self._settings)
        elif kind.requires_logging_directory:
            tracker = kind(self._run, self._out)
        else:
            tracker = kind(project)
        tracker.start()
        return tracker

    def _identity(self) -> str:
        file = self._out / _IDENTITY
        if file.is_file():
            return file.read_text(encoding="utf-8").strip()
        identity = secrets.token_hex(4)
        self._out.mkdir(parents=True, exist_ok=True)
        file.write_text(identity, encoding="utf-8")
        return identity


@functools.cache
def _leave_word_to_callers() -> None:
    """What TensorBoard's own thread fails with, on a full disk say, is raised once more by the next call that writes, and said
    then; from the thread it would come as a traceback.
    """
    before = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if not type(failed.thread).__module__.startswith("tensorboard."):
            before(failed)

    threading.excepthook = hook
