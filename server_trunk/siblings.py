"""The processes of a server that one agent has started on one machine: each can end another that hangs."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import torch.distributed as dist

from server_trunk.plain_values import gather_values

__all__ = ["Siblings"]


class Siblings:
    """All processes make one at the same point, after they have joined. Where the system has no handles of processes, or they
    are on several machines, some or all are not known.
    """

    def __init__(self) -> None:
        try:
            near: tuple[str, str, int] | None = (
                Path("/proc/sys/kernel/random/boot_id").read_text(),
                os.readlink("/proc/self/ns/pid"),
                os.getppid(),
            )
        except OSError:
            near = None
        told = gather_values((near, os.getpid()), dist.new_group(backend="gloo"))
        self._handles: dict[int, int] = {}  # by rank; each stays its own when the process's number is another's
        for rank, (where, number) in enumerate(told):
            if near is not None and where == near:
                with contextlib.suppress(AttributeError, OSError):
                    self._handles[rank] = os.pidfd_open(number)

    def kill(self, rank: int) -> None:
        """At once, where it is known and lives."""
        if rank in self._handles:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._handles[rank], signal.SIGKILL)
