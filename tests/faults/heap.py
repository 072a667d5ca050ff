"""What a process has in use of its C heap. Resident memory grows also with what an allocator keeps of what was freed."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

__all__ = ["heap_mib", "note_heap"]

#: Seconds between two looks.
_LOOK = 5.0


def heap_mib() -> float | None:
    """MiB; None where the system does not say (it is glibc that does)."""

    class Mallinfo(ctypes.Structure):
        _fields_: ClassVar[list[tuple[str, Any]]] = [(name, ctypes.c_size_t) for name in "abcdefghij"]

    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return None
    ask.restype = Mallinfo
    gc.collect()
    said = ask()
    return float(said.e + said.h) / 2**20  # mapped for large pieces; in use of all arenas


def note_heap(file: Path) -> None:
    """From now on, and as long as this process lives, say it in ``file``: a JSON object a line."""

    def look() -> None:
        while (mib := heap_mib()) is not None:
            with file.open("a") as lines:
                print(json.dumps({"time": time.time(), "pid": os.getpid(), "mib": round(mib, 3)}), file=lines)
            time.sleep(_LOOK)

    threading.Thread(target=look, name="heap", daemon=True).start()
