"""The disk below a soak's server, or below a client of it: a small one, which can be full for a while; and what is left on it."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from splitfl.checkpoint import load_checkpoint
from splitfl.errors import CheckpointError
from tests.faults.disk import NO_ROOM, fill, free, mount, unmount
from tests.faults.processes import Process

__all__ = ["Disk", "broken"]

#: Who has found no room has said so and ended so many seconds after there is some again.
_SAYS_SO = 20.0


class Disk:
    """``place``: a directory that is not there yet; ``mib``: the disk's size. Where this user may mount none, ``is_small`` is
    False, and it is a directory like any other.
    """

    def __init__(self, place: Path, mib: int) -> None:
        self._place, self._full = place, [(0.0, 0.0)]  # from and until, seconds of the wall clock
        self.is_small = mount(place, mib)

    @property
    def is_full(self) -> bool:
        return self._full[-1][1] == math.inf

    @property
    def full_for(self) -> float:
        """Seconds for which it has been full; 0 where it is not."""
        return time.time() - self._full[-1][0] if self.is_full else 0.0

    def fill(self) -> Callable[[], None]:
        """Returns what frees it again, but not of what fills it later."""
        self._full.append((time.time(), math.inf))
        fill(self._place)
        times = len(self._full)
        return lambda: self.free() if len(self._full) == times else None

    def free(self) -> None:
        if self.is_full:
            free(self._place)
            self._full[-1] = (self._full[-1][0], time.time())

    def was_full(self, at: float) -> bool:
        """Whether what happened ``at`` (seconds of the wall clock) may be for want of room."""
        return any(begun <= at <= ended + _SAYS_SO for begun, ended in self._full)

    def explains(self, ended: Process) -> bool:
        """Whether this process, which ends now, does so for want of room, in a sentence that says it."""
        return ended.code == 2 and self.was_full(time.time()) and any(NO_ROOM in line for line in ended.said.splitlines()[-1:])

    def close(self) -> None:
        """What is on it stays, in a directory like any other. Nobody writes there any more."""
        if not self.is_small:
            return
        self.free()
        kept = self._place.with_name(f"{self._place.name}.kept")
        shutil.copytree(self._place, kept)
        unmount(self._place)
        self._place.rmdir()
        kept.rename(self._place)
        self.is_small = False


def broken(run: Path) -> list[str]:
    """Checkpoints of ``run`` that cannot be read, those that were put aside for it among them. There are none, however the
    process ended that wrote them.
    """
    found = [f"{directory} was put aside" for directory in sorted((run / "checkpoints").glob("damaged-*"))]
    for directory in sorted((run / "checkpoints").glob("step-*")):
        try:
            load_checkpoint(directory)
        except CheckpointError as error:
            found.append(f"left behind: {error}")
    return found
