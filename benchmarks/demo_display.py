"""What a person sees of the demo's processes while they train: a live table on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitfl.errors import SplitflError

__all__ = ["Watched", "events", "follow", "last_line"]


@dataclass(frozen=True)
class Watched:
    """A process, the file its output goes to, and its JSON log."""

    process: subprocess.Popen[str]
    output: Path
    log: Path


def last_line(path: Path) -> str:
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def events(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's JSON log; a line still being written is left for later."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def follow(watched: Mapping[str, Watched], total: int) -> None:
    """Show each process live, by name, until all have ended. Raises SplitflError naming the first that failed."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    spoken = 0.0
    with Live(console=console, refresh_per_second=4) if console.is_terminal else contextlib.nullcontext() as live:
        while True:
            running = [one.process.poll() is None for one in watched.values()]
            for name, one in watched.items():
                if one.process.poll() not in (None, 0):
                    raise SplitflError(f"{name} failed: {last_line(one.output)}")
            steps = {name: [event for event in events(one.log) if event["event"] == "step"] for name, one in watched.items()}
            if live is not None:
                live.update(_table(steps, total))
            elif time.monotonic() - spoken > 5 or not any(running):
                spoken = time.monotonic()
                print("  ".join(f"{name} {len(own)}/{total}" for name, own in steps.items()), flush=True)
            if not any(running):
                return
            time.sleep(0.25)


def _table(steps: Mapping[str, Sequence[dict[str, Any]]], total: int) -> Any:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table(box=None)
    for column in ("process", "", "step", "loss", "tokens/s"):
        table.add_column(column)
    for name, own in steps.items():
        newest = own[-1] if own else {}
        loss = f"{newest['loss']:.4f}" if "loss" in newest else ""
        rate = newest.get("tokens_per_second")
        bar = ProgressBar(total=total, completed=len(own), width=30)
        table.add_row(name, bar, f"{len(own)}/{total}", loss, f"{rate:.0f}" if rate else "")
    return table
