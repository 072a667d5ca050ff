"""The clocks of a channel: when to send a heartbeat, when silence means that the peer is gone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds. ``heartbeat``: between two of ours. ``silence``: after which the peer counts as lost. ``flush``: how
    long closing waits for what is queued. ``linger``: how long the sockets then have to send it. ``overdue``: for how long
    records that the peer says it has sent may stay away while nothing at all comes on the data connection. ``stall``: after
    which a client that reads nothing of its answers is dropped.
    """

    heartbeat: float = 5.0
    silence: float = 20.0
    flush: float = 5.0
    linger: float = 2.0
    overdue: float = 60.0
    stall: float = 120.0
