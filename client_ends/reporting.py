"""What is told of a client's steps and evaluations: to its log, its terminal and its trackers, the same figures to each."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from client_ends.progress import Progress
from client_ends.session import TrunkSession
from client_ends.tracking import Tracking
from splitfl.runlog import RunLog

__all__ = ["Reporter"]


class Reporter:
    """Of one training run. Steps are numbered from 0 in the log; trackers have a step's figures at the number of steps made
    with it, as a Trainer has.
    """

    def __init__(self, log: RunLog, progress: Progress, tracking: Tracking, session: TrunkSession) -> None:
        self._log, self._progress, self._tracking, self._session = log, progress, tracking, session
        self._began = 0.0
        self._before = (0.0, 0, 0)

    def begin_step(self) -> None:
        """The next :meth:`step` is of what happens from here on."""
        self._began, self._before = time.monotonic(), self._counted()

    def _counted(self) -> tuple[float, int, int]:
        session = self._session
        return session.waits.seconds, session.bytes_sent, session.bytes_received

    def step(self, step: int, *, loss: float, targets: int, tokens: float, learning_rate: float, grad_norm: float | None) -> None:
        """One step has been made: its loss over ``targets``, its ``tokens`` (padding apart), the ends' learning rate, and the
        norm of their gradient before it was clipped, if there is one.
        """
        seconds = time.monotonic() - self._began
        waited, sent, received = (now - before for now, before in zip(self._counted(), self._before, strict=True))
        figures = {
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "seconds": round(seconds, 4),
            "seconds_waiting": round(waited, 4),
            "tokens_per_second": round(tokens / seconds, 1) if seconds > 0 else None,
            "bytes_sent": sent,
            "bytes_received": received,
        }
        self._log.write("step", quiet=True, step=step, targets=targets, **figures)
        self._track(step + 1, "train", figures)
        self._progress.step(step + 1, loss=loss, tokens_per_second=tokens / seconds if seconds > 0 else 0.0)

    def evaluation(self, when: str, made: int, report: Mapping[str, Any]) -> None:
        """What was found on held-out rows after ``made`` steps."""
        self._log.write("evaluation", when=when, made=made, **report)
        self._track(made, "eval", report)
        self._progress.say(f"held out, {when}: " + "  ".join(f"{name} {value:.4g}" for name, value in report.items()))

    def _track(self, made: int, kind: str, figures: Mapping[str, Any]) -> None:
        self._tracking.log(made, {f"{kind}/{name}": value for name, value in figures.items() if value is not None})
