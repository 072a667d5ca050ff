"""What a server's log says: one row an event, from which ``splitfl log`` makes its sentences and the tests check the README.

A line of ``log.jsonl`` is one JSON object: ``time`` (Unix seconds), ``event``, and the event's own fields. A field that says
nothing is null or not there.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["EVENTS", "Event", "sentence"]


@dataclass(frozen=True, slots=True)
class Event:
    """``fields``: their names. ``said``: the sentence for a person, fields in braces. ``routine``: comes all the time."""

    fields: tuple[str, ...]
    said: str
    routine: bool = False


_STEP = (
    *("step", "targets", "targets_here", "met", "learning_rate", "grad_norm", "skipped"),
    *("tokens", "seconds", "tokens_per_second", "busy", "parts"),
)
_ROUND = ("round", "step", "targets", "members", "left_out", "bytes_received", "bytes_sent", "seconds")

EVENTS: dict[str, Event] = {
    # Who comes and goes.
    "joined": Event(("client", "address", "session"), "{client} has joined from {address}"),
    "left": Event(("client", "session", "why", "lost"), "{client} has left: {why}"),
    "refused": Event(("who", "code", "why"), "{who} was refused ({code}): {why}"),
    "held": Event(("client", "step"), "step {step} is held for {client}, which was lost"),
    "late": Event(("client", "session", "step"), "step {step} waits no longer for {client}, which is late"),
    "dropped": Event(("client", "step", "why", "targets"), "step {step} was made without all of {client} ({why})"),
    "moved": Event(("client", "session", "after"), "{client} goes to another replica after step {after}"),
    "version-differs": Event(
        ("client", "library", "client_has", "server_has"), "{client} has {library} {client_has}, the server {server_has}"
    ),
    # What goes wrong with what they send.
    "forward-failed": Event(("client", "error"), "a forward of {client} cannot run: {error}"),
    "backward-failed": Event(("client", "error"), "a backward of {client} cannot run: {error}"),
    "gradient-not-finite": Event(
        ("client", "step", "micro_batches"),
        "{client} sent gradients that are not finite in step {step} ({micro_batches} micro-batches): they count as zero",
    ),
    "gradient-no-targets": Event(
        ("client", "step", "micro_batches"),
        "{client} sent gradients of no target token in step {step} ({micro_batches} micro-batches): they count as zero",
    ),
    "adapter-unreadable": Event(("client", "error"), "the adapter of {client} cannot be read: {error}"),
    # The run.
    "serving": Event(("join",), "serving at {join}"),
    "step": Event(_STEP, "step {step}: {targets} targets in {seconds} s", routine=True),
    "round": Event(_ROUND, "round {round}: the ends of {members} averaged", routine=True),
    "checkpoint": Event(("step", "directory"), "kept step {step} in {directory}", routine=True),
    "checkpoint-damaged": Event(("step", "error", "kept_as"), "the checkpoint of step {step} is damaged: {error}"),
    "resumed": Event(("step", "clients"), "goes on after step {step}"),
    "went-back": Event(("step",), "went back to step {step}, after which all who are here can go on"),
    "failed": Event(("error",), "the trunk failed: {error}"),
    "stopped": Event(("why",), "stopped: {why}"),
    # The machine.
    "out-of-memory": Event(("most_tokens",), "out of memory: batches run in pieces of at most {most_tokens} tokens"),
    "no-caches": Event(("why",), "clients generate without caches: {why}"),
    "dropout-not-keyed": Event(("why",), "dropout depends on how batches are put together: {why}"),
    "metrics": Event(("url",), "live numbers at {url}"),
    "status": Event(("...",), "live numbers", routine=True),
    "log-gap": Event(("lines",), "{lines} lines are missing here: the log could not be written"),
}


class _Gaps(string.Formatter):
    """A field that is not there is a dash."""

    def get_value(self, key: int | str, args: Any, kwargs: Mapping[str, Any]) -> Any:
        value = kwargs.get(str(key))
        if isinstance(value, dict | list):
            return ", ".join(map(str, value))
        return "-" if value is None else value


def sentence(event: Mapping[str, Any]) -> str:
    """A line of the log for a person; an event of another version, or a client's, as it stands."""
    known = EVENTS.get(event["event"])
    if known is None:
        rest = {name: value for name, value in event.items() if name not in ("time", "event")}
        return json.dumps(rest, ensure_ascii=False) if rest else ""
    return _Gaps().vformat(known.said, (), event)
