"""A run's event log: one JSON object a line in a file, and the same in one readable line on standard error."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

__all__ = ["RunLog"]


class RunLog:
    """Appends events; safe to call from any thread. Secrets and tensors have no business in an event.

    A disk that is full ends no run for the log's sake: what cannot be written is counted, and the count is written
    (``log-gap``) once there is room again.
    """

    def __init__(self, path: Path | None, *, echo: IO[str] | None = sys.stderr) -> None:
        """``path``: the JSON-lines file (None: no file). ``echo``: where the readable line goes (None: nowhere)."""
        self._lock = threading.Lock()
        self._echo = echo
        self._file: IO[bytes] | None = None
        self._missing = 0
        self._amid_a_line = False  # what was tried last may stand there in part, also from a process before this one
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
            self._amid_a_line = _ends_amid_a_line(self._file)

    def write(self, event: str, *, quiet: bool = False, **fields: Any) -> None:
        """Log ``event`` with its fields. ``quiet``: to the file only."""
        with self._lock:
            if self._file is not None:
                self._append(self._file, event, fields)
            if self._echo is not None and not quiet:
                words = "  ".join(f"{key}={_short(value)}" for key, value in fields.items() if value is not None)
                self._echo.write(f"{time.strftime('%H:%M:%S')} {event}  {words}\n")
                self._echo.flush()

    def _append(self, file: IO[bytes], event: str, fields: dict[str, Any]) -> None:
        if self._missing and self._put(file, _line("log-gap", {"lines": self._missing})):
            self._missing = 0
        if self._missing or not self._put(file, _line(event, fields)):
            self._missing += 1

    def _put(self, file: IO[bytes], line: bytes) -> bool:
        """Whether ``line`` stands in the file. In part it may where it does not."""
        rest = b"\n" + line if self._amid_a_line else line
        try:
            while rest:
                written = file.write(rest)
                self._amid_a_line = rest[written - 1 : written] != b"\n"
                rest = rest[written:]
        except OSError as error:
            if not self._missing and self._echo is not None:
                self._echo.write(f"{time.strftime('%H:%M:%S')} the log cannot be written ({error.strerror}): make room\n")
        return rest in (b"", b"\n")  # its end alone is what the next begins with

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None


def _ends_amid_a_line(file: IO[bytes]) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def _line(event: str, fields: dict[str, Any]) -> bytes:
    return (json.dumps({"time": round(time.time(), 3), "event": event, **fields}, ensure_ascii=False) + "\n").encode()


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    text = str(value)
    return f'"{text}"' if " " in text else text
