"""``splitfl log``: what befell a run, a line an event, for a person."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from splitfl.errors import ConfigError
from splitfl.events import EVENTS, sentence

__all__ = ["LogFiles", "add_arguments", "line", "run"]

_REFRESH = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's directory, as runs/RUN, or a log.jsonl")
    parser.add_argument("--follow", action="store_true", help="go on as the log grows, until Ctrl-C")
    parser.add_argument("--all", action="store_true", help="steps, checkpoints and rounds too, which come all the time")
    parser.add_argument("--client", metavar="NAME", help="only what names this client")


def run(args: argparse.Namespace) -> int:
    files = LogFiles(Path(args.run))
    try:
        while True:
            for event in files.read():
                if _wanted(event, args):
                    print(line(event), flush=True)
            if not args.follow:
                return 0
            time.sleep(_REFRESH)
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:
        sys.stderr.close()  # or Python says at its end that it cannot flush
        return 0


def _wanted(event: Mapping[str, Any], args: argparse.Namespace) -> bool:
    known = EVENTS.get(event["event"])
    if event["event"] == "status" or (known is not None and known.routine and not args.all):
        return False
    if not args.client:
        return True
    who = str(event.get("who") or "").split(" at ")[0]
    return args.client in (event.get("client"), who) or args.client in (event.get("parts") or {})


def line(event: Mapping[str, Any]) -> str:
    """Date and time here, the event, what it says."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
    return f"{when}  {event['event']:<16} {sentence(event)}".rstrip()


class LogFiles:
    """The logs of a run: of its server, or of each of its replicas."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError where no log is."""
        found = [path] if path.is_file() else [*path.glob("log.jsonl"), *sorted(path.glob("log-*.jsonl"))]
        if not found:
            raise ConfigError(f"{path} holds no log.jsonl: name the directory of a run, as runs/RUN")
        self._rests = dict.fromkeys(found, (0, b""))

    def read(self) -> Iterator[dict[str, Any]]:
        """What has come since the last call; of several files in the order of their times."""
        events = [event for file in self._rests for event in self._new(file)]
        yield from sorted(events, key=lambda event: event["time"]) if len(self._rests) > 1 else events

    def _new(self, file: Path) -> list[dict[str, Any]]:
        offset, rest = self._rests[file]
        with file.open("rb") as handle:
            handle.seek(offset)
            data = handle.read()
        *lines, after = (rest + data).split(b"\n")
        self._rests[file] = offset + len(data), after
        events = []
        for text in lines:
            try:
                event = json.loads(text)
                float(event["time"]), str(event["event"])
            except (ValueError, TypeError, KeyError):
                continue  # half of a line, where the disk was full
            events.append(event)
        return events
