"""``splitfl top``: live numbers of a run in the terminal, from its log or from its metrics endpoint."""

from __future__ import annotations

import argparse
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from splitfl.errors import ConfigError, ConnectError

__all__ = ["add_arguments", "run"]

_REFRESH = 1.0
# Of a long log only the end is read at first: far more than lies between two status lines.
_TAIL = 16 << 20
_PATIENCE = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN", help="a server's run directory, or the URL of its metrics endpoint (splitfl serve --metrics)"
    )
    parser.add_argument("--once", action="store_true", help="print the numbers once and end")


def run(args: argparse.Namespace) -> int:
    source: _Source = _Endpoint(args.run) if re.match(r"https?://", args.run) else _Log(Path(args.run))
    console = Console()
    status, note = source.read()
    if args.once:
        if status is None:
            raise ConfigError(f"{args.run}: {note}")
        console.print(frame(status, note))
        return 0
    try:
        with Live(frame(status, note), console=console, auto_refresh=False, screen=console.is_terminal) as live:
            while True:
                time.sleep(_REFRESH)
                live.update(frame(*source.read()), refresh=True)
    except KeyboardInterrupt:
        return 0


# --- where the numbers come from ------------------------------------------------------------------------------------------------


class _Source(Protocol):
    def read(self) -> tuple[dict[str, Any] | None, str]:
        """The newest status, None where there is none yet, and a note on it."""


class _Log:
    """The status lines of a run's log, also while it is written."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError where no log is."""
        places = [path] if path.is_file() else [path / "log.jsonl", path / "server" / "log.jsonl"]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise ConfigError(f"{path} holds no log.jsonl: name the directory of a server's run, as runs/RUN, or a metrics URL")
        self._path = found
        self._offset = max(0, found.stat().st_size - _TAIL)
        self._rest = b""
        self._status: dict[str, Any] | None = None
        self._ended = ""

    def read(self) -> tuple[dict[str, Any] | None, str]:
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take(line)
        if self._status is None:
            return None, "no status line yet; the server writes one every status_every seconds in which something happens"
        age = max(0.0, time.time() - self._status["time"])
        return self._status, self._ended or f"{age:.0f} s ago"

    def _take(self, line: bytes) -> None:
        try:
            event = json.loads(line)
            kind = event["event"]
        except (ValueError, TypeError, KeyError):
            return  # the first line read may be half of one
        if kind == "status":
            self._status = event
        elif kind in ("stopped", "failed"):
            self._ended = f"{kind}: {event.get('why') or event.get('error')}"
        elif kind == "serving":
            self._ended = ""


class _Endpoint:
    """The metrics endpoint of a run."""

    def __init__(self, url: str) -> None:
        base = re.sub(r"/(metrics|status\.json)?$", "", url)
        self._url = f"{base}/status.json"
        self._status: dict[str, Any] | None = None

    def read(self) -> tuple[dict[str, Any] | None, str]:
        """Raises ConnectError where it has never answered."""
        try:
            with urllib.request.urlopen(self._url, timeout=_PATIENCE) as answer:
                found = json.load(answer)
            if not isinstance(found, dict) or "clients" not in found:
                raise ValueError("it answers something else")
        except (OSError, ValueError) as error:
            why = getattr(error, "reason", error)
            if self._status is None:
                raise ConnectError(f"no live numbers at {self._url} ({why}): is the run up, with --metrics?") from None
            return self._status, f"no answer: {why}"
        self._status = found
        return found, "now"


# --- what is shown --------------------------------------------------------------------------------------------------------------


def frame(status: Mapping[str, Any] | None, note: str) -> Group:
    """One picture of a status: a line or two on the whole, a table of the clients."""
    if status is None:
        return Group(Text(note))
    queue = status["queue"]
    head = Text()
    head.append(f"{status['sessions']} session(s), step {status['steps']}, up {_duration(status['seconds'])}  ", style="bold")
    head.append(f"({note})\n", style="dim")
    head.append(
        f"{status['tokens_per_second']:.0f} tokens/s   engine busy {_percent(status['busy'])}   batches full to "
        f"{_percent(status['occupancy'])}, {_plain(status['members'])} members, {_percent(status['padding'])} pads\n"
        f"queue {_times(queue['forward'])} ms forward, {_times(queue['backward'])} ms backward   "
        f"waiting {status['waiting_tokens']} tokens, graphs of {status['graph_tokens']}"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("client", no_wrap=True)
    for title in ("tok/s", "tokens", "queue ms 50/95 %", "kept", "MB in", "MB out", "steps", "dropped"):
        table.add_column(title, justify="right", no_wrap=True)
    for name in sorted(status["clients"], key=_natural):
        client = status["clients"][name]
        table.add_row(name, *_cells(client, client["queue"]), style="" if client["sessions"] else "dim")
    kept = sum(client["kept_tokens"] for client in status["clients"].values())
    table.add_section()
    table.add_row("all", *_cells({**status, "kept_tokens": kept}, None), style="bold")
    return Group(head, table)


def _cells(numbers: Mapping[str, Any], queue: Mapping[str, Any] | None) -> list[str]:
    return [
        f"{numbers['tokens_per_second']:.0f}",
        str(numbers["tokens"]),
        "" if queue is None else _times(queue),
        str(numbers["kept_tokens"]),
        f"{numbers['bytes_received'] / 1e6:.1f}",
        f"{numbers['bytes_sent'] / 1e6:.1f}",
        str(numbers["steps"]),
        str(numbers["dropped"]),
    ]


def _times(queue: Mapping[str, Any]) -> str:
    if queue["median"] is None:
        return "-"
    return f"{1000 * queue['median']:.0f}/{1000 * queue['p95']:.0f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _plain(number: float | None) -> str:
    return "-" if number is None else f"{number:.1f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _natural(name: str) -> list[tuple[int, str]]:
    """client2 before client10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
