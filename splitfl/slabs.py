"""Large host buffers that are used again once nobody holds them.

Fresh memory is zeroed by the kernel and faulted in page by page, which costs more than receiving does; and above 32 MiB
malloc maps and unmaps each buffer whatever it is told. So slabs are mapped here, in huge pages where there are any, and some
are kept.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import sys
import threading
import weakref
from typing import Any, TypeAlias

import numpy as np

__all__ = ["SMALLEST", "Slabs", "slabs"]

# Of bytes; Any, as NumPy's own types are no buffers to mypy before Python 3.12.
Slab: TypeAlias = Any

#: Below this malloc serves as well, bytes. A huge page of x86-64 and of arm64 with small pages.
SMALLEST = 2 * 2**20
_KEPT_BYTES = 128 * 2**20


class Slabs:
    """Keeps up to ``kept`` bytes of slabs that nobody holds. Any thread may take and let go."""

    def __init__(self, kept: int = _KEPT_BYTES) -> None:
        self._kept = kept
        self._idle: list[Slab] = []  # the longest unused first
        # Letting go may happen amid taking, on the same thread, as it is told by the garbage collector: it only appends.
        self._lock = threading.RLock()

    @property
    def idle(self) -> int:
        """Bytes kept that nobody holds."""
        return sum(map(len, self._idle))

    def take(self, size: int) -> Slab:
        """An array of ``size`` bytes, contents undefined. Its memory may be another's once no view of it is left."""
        with self._lock:
            slab = self._fitting(size)
        if slab is None:
            slab = _map(-(-size // SMALLEST) * SMALLEST)
        # Not a slice: NumPy's views of that would hold the slab, and not the lease.
        lease = np.frombuffer(memoryview(slab)[:size], np.uint8)
        weakref.finalize(lease, self._let_go, slab).atexit = False
        return lease

    def _fitting(self, size: int) -> Slab | None:
        """The smallest idle slab that fits without wasting half of itself; makes room for a new one where there is none."""
        fitting = [number for number, slab in enumerate(self._idle) if size <= len(slab) <= 2 * size]
        if fitting:
            return self._idle.pop(min(fitting, key=lambda number: len(self._idle[number])))
        while self._idle and self.idle + size > self._kept:
            del self._idle[0]
        return None

    def _let_go(self, slab: Slab) -> None:
        with self._lock:
            if self.idle + len(slab) <= self._kept:
                self._idle.append(slab)


@functools.cache
def slabs() -> Slabs:
    """This process's own."""
    return Slabs()


def _map(size: int) -> Slab:
    if sys.platform == "win32":
        return np.empty(size, np.uint8)
    memory: Any = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
