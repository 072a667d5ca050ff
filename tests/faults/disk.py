"""A small disk, which can be full: mounted, which needs root."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

__all__ = ["NO_ROOM", "fill", "free", "mount", "unmount"]

#: What the system says of a full disk.
NO_ROOM = "No space left on device"


def mount(place: Path, mib: int = 4) -> bool:
    """A disk of so many MiB at ``place``; False where this user may mount none."""
    place.mkdir(parents=True)
    return not subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", place], capture_output=True).returncode


def unmount(place: Path) -> None:
    subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(os.urandom(4096)):
                pass
        except OSError:
            return


def free(disk: Path) -> None:
    (disk / "filler").unlink(missing_ok=True)
