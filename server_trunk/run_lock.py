"""One server a run: whoever keeps a run's directory holds a lock there, which the system takes back when its process dies."""

from __future__ import annotations

import errno
import sys
import time
from pathlib import Path

from splitfl.errors import ConfigError

if sys.platform != "win32":
    import fcntl

__all__ = ["RunLock"]

#: Seconds for which a server that was killed may take to be gone.
_DYING = 5.0
_LOOK = 0.1


class RunLock:
    """Held from its making on. Where the file system knows no locks, or the system, nothing is."""

    def __init__(self, out: Path, patience: float = _DYING) -> None:
        """Raises ConfigError where another server holds it, OSError where there is no writing to ``out``."""
        self._file = (out / "server.lock").open("a", encoding="utf-8")
        give_up = time.monotonic() + patience
        while not self._taken():
            if time.monotonic() >= give_up:
                self.release()
                raise ConfigError(f"another server keeps its run in {out}: end that one, or choose another directory with --out")
            time.sleep(_LOOK)

    def _taken(self) -> bool:
        if sys.platform != "win32":
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                return error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN)
        return True

    def release(self) -> None:
        self._file.close()
