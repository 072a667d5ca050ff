"""What a person sees while a client trains: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

__all__ = ["Progress"]

#: Without a terminal, seconds between lines.
INTERVAL = 5.0


class Progress:
    """Writes to standard error. ``quiet`` writes nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._total = 0
        self._spoke = 0.0

    def say(self, text: str) -> None:
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def begin(self, total: int) -> None:
        self._total = total
        if self._quiet or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:.0f} tokens/s"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._bar.start()
        self._task = self._bar.add_task("training", total=total, loss=float("nan"), rate=0.0)

    def step(self, done: int, *, loss: float, tokens_per_second: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, loss=loss, rate=tokens_per_second)
            return
        now = time.monotonic()
        if not self._quiet and (now - self._spoke >= INTERVAL or done == self._total):
            self._spoke = now
            self.say(f"step {done}/{self._total}  loss {loss:.4f}  {tokens_per_second:.0f} tokens/s")

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
