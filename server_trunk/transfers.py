"""Tensors on their way between host and device, beside the computation rather than before and after it.

On CUDA, copies run on streams of their own: the next batch is on its way to the device while one runs, and an answer leaves while
the next batch already runs. Elsewhere nothing moves.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["CudaTransfers", "Landing", "Mailer", "Transfers"]


@dataclass(frozen=True, slots=True)
class Landing:
    """Tensors ``(rows, hidden)`` in host memory (None where nothing is to travel), whole once ``wait`` has returned; ``wait``
    None: they are whole already. ``took()``: then, the seconds the device worked on them.
    """

    tensors: list[torch.Tensor | None]
    took: Callable[[], float]
    wait: Callable[[], None] | None = None


class Transfers:
    """Where host and device share their memory, or copies cannot overlap: every copy is made at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._until = 0.0  # when the newest work ended

    def begin(self) -> Any:
        """The work on a batch begins; returns what :meth:`down` is to be told of it."""
        return time.perf_counter()

    def up(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device, for the calling thread to compute with."""
        return tensor.to(self._device)

    def down(self, tensors: Sequence[torch.Tensor | None], began: Any) -> Landing:
        """The work that ``began`` ends; its results in host memory, contiguous."""
        landed = [None if tensor is None else tensor.to("cpu").contiguous() for tensor in tensors]
        # Time in which two batches ran side by side is the first one's.
        since, self._until = max(began, self._until), time.perf_counter()
        seconds = self._until - since
        return Landing(landed, lambda: seconds)


class CudaTransfers(Transfers):
    """Copies on streams of their own, through page-locked host memory."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._up, self._down = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def begin(self) -> Any:
        start = torch.cuda.Event(enable_timing=True)
        start.record(torch.cuda.current_stream(self._device))
        return start

    def up(self, tensor: torch.Tensor) -> torch.Tensor:
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._up):
            moved = tensor.to(self._device, non_blocking=True)
        computing.wait_stream(self._up)
        # The allocator must not give this memory away while the computing stream still uses it.
        moved.record_stream(computing)
        return moved

    def down(self, tensors: Sequence[torch.Tensor | None], began: Any) -> Landing:
        computing = torch.cuda.current_stream(self._device)
        end, landed_all = torch.cuda.Event(enable_timing=True), torch.cuda.Event()
        end.record(computing)
        self._down.wait_stream(computing)
        landed: list[torch.Tensor | None] = []
        with torch.cuda.stream(self._down):
            for tensor in tensors:
                host = None
                if tensor is not None:
                    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                    host.copy_(tensor, non_blocking=True)
                    tensor.record_stream(self._down)
                landed.append(host)
            landed_all.record(self._down)
        return Landing(landed, lambda: began.elapsed_time(end) / 1000, landed_all.synchronize)


class Mailer:
    """Sends what has landed, in a thread of its own where it has yet to land; in order, and at once where it has.

    At most ``depth`` landings are awaited: whoever would send more waits, so that the device is never far behind its thread.
    """

    def __init__(self, on_failure: Callable[[], None] = lambda: None, depth: int = 2) -> None:
        """``on_failure``: called, in the mailer's thread, once :meth:`check` has something to raise."""
        self._on_failure = on_failure
        self._waiting: queue.Queue[tuple[Landing, Callable[[], None]] | None] = queue.Queue(depth)
        self._thread: threading.Thread | None = None
        self.failure: BaseException | None = None

    def send(self, landing: Landing, leave: Callable[[], None]) -> None:
        """Call ``leave`` once ``landing`` is whole. Raises what an earlier landing failed with."""
        self.check()
        if landing.wait is None and self._thread is None:
            leave()
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mailer", daemon=True)
            self._thread.start()
        self._waiting.put((landing, leave))

    def check(self) -> None:
        """Raises what a landing failed with."""
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            landing, leave = item
            if self.failure is not None:
                continue  # drained, so that nobody waits for room
            try:
                if landing.wait is not None:
                    landing.wait()
                leave()
            except BaseException as error:
                self.failure = error
                self._on_failure()

    def close(self) -> None:
        """Send what is left, and end."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
            self._thread = None
