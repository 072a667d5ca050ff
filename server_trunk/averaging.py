"""The clients' ends on the server: each upload kept apart until it is whole, then the weighted mean of those that are.

Uploads lie in unnamed files of the run's directory, and so does the average, which is mapped where it is read. So memory holds
parts on their way to disk, as many as the clients' credit covers, and one slice of the sum; and who vanishes amid its upload
leaves nothing behind. Everything runs in a thread of its own, in order; the trunk's is told what has happened.
"""

from __future__ import annotations

import contextlib
import mmap
import queue
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch

from splitfl.adapters.layout import Layout, TensorSpec
from splitfl.disk_errors import said_if_unwritable
from splitfl.protocol.control import DTYPES as ITEM_BYTES
from splitfl.protocol.messages import EndsPart
from splitfl.tensors import DTYPES, byte_view

__all__ = ["Average", "Averager", "Done", "Replicas", "Whole"]

#: Elements of the sum held at a time.
_SLICE = 1 << 20

#: Seconds that the thread may take to its end; it may be waiting for a replica that is gone.
_GOODBYE = 10.0


class Replicas(Protocol):
    """The replicas of a run that has several: each gathers its own clients' ends, and one average is made of all."""

    rank: int
    size: int

    def all_reduce_tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        """Sum tensors over all replicas, in place. Each calls it at the same points."""


@dataclass(frozen=True)
class Average:
    """The average of round ``number``, in the dtypes and order of ``layout``, behind one another in ``memory``."""

    number: int
    layout: Layout
    memory: memoryview

    def part(self, tensor: int, offset: int, size: int) -> memoryview:
        """Some bytes of one tensor."""
        begin = self.layout.offsets[tensor] + offset
        return self.memory[begin : begin + size]

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, mapped and not to be written to."""
        found = {}
        for spec, begin in zip(self.layout.tensors, self.layout.offsets, strict=True):
            flat = torch.frombuffer(self.memory, dtype=DTYPES[spec.dtype], count=spec.elements, offset=begin)
            found[spec.name] = flat.view(spec.shape)
        return found


@dataclass(frozen=True, slots=True)
class Whole:
    """All of a session's ends for a round have come. ``why``: what makes them useless; empty where nothing does."""

    session: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Done:
    """A round's average is there (None: nobody's ends were in it), of so many ``members`` on all replicas, with so many
    ``targets``. ``fits``: whether this replica's clients train what the others' do; if not, theirs are not in it. ``void``: some
    replica has given the round up.
    """

    average: Average | None
    members: int
    targets: int
    fits: bool = True
    void: bool = False


@dataclass
class _Upload:
    file: BinaryIO | None
    left: int
    why: str = ""


class Averager:
    """One run's uploads and averages. ``write``, ``discard`` and ``average`` return at once; from any thread."""

    def __init__(
        self,
        directory: Path,
        *,
        credit: Callable[[str, int], None],
        tell: Callable[[], None],
        replicas: Replicas | None = None,
    ) -> None:
        """``credit(session, bytes)``: a part has left memory. ``tell()``: something is to be taken by :meth:`take`."""
        self._directory, self._credit, self._tell, self._replicas = directory, credit, tell, replicas
        self._uploads: dict[str, _Upload] = {}
        self._work: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._news: queue.SimpleQueue[Whole | Done] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    # --- any thread -------------------------------------------------------------------------------------------------------------

    def write(self, session: str, layout: Layout, part: EndsPart, payload: torch.Tensor) -> None:
        """Keep one part, ``(1, size)`` bytes, of a session's ends."""
        self._do(lambda: self._write(session, layout, part, payload))

    def discard(self, session: str) -> None:
        """Forget what a session has sent."""
        self._do(lambda: self._forget(session))

    def average(self, number: int, layout: Layout | None, weights: Mapping[str, int], *, void: bool = False) -> None:
        """Average the whole uploads of the sessions in ``weights``, in that order, and forget all uploads. ``layout``: of this
        replica's clients; None where it has had none. ``void``: give the round up, on all replicas.
        """
        self._do(lambda: self._average(number, layout, dict(weights), void))

    def take(self) -> list[Whole | Done]:
        """What has happened since this was asked last. Raises what the thread failed with, if it did: ``NotWritten`` where an
        average could not be kept, which is for the run to end with, as it is no member's doing.
        """
        if self._failure is not None:
            raise self._failure
        news = []
        while not self._news.empty():
            news.append(self._news.get())
        return news

    def close(self) -> None:
        """End, when the work at hand is done; what waits is dropped."""
        if self._thread is not None:
            self._failure = self._failure or RuntimeError("the server has stopped")
            self._work.put(None)
            self._thread.join(_GOODBYE)
            self._thread = None

    def restore(self, number: int, tensors: Mapping[str, torch.Tensor]) -> Average:
        """The average of round ``number``, as a checkpoint has it. Raises ``NotWritten``."""
        layout = Layout.of(tensors)
        with self._said():
            return self._map(number, layout, [byte_view(tensors[spec.name].contiguous()) for spec in layout.tensors])

    def _do(self, work: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="rounds", daemon=True)
            self._thread.start()
        self._work.put(work)

    # --- its own thread ---------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            if self._failure is not None:
                continue
            try:
                work()
            except BaseException as error:
                self._failure = error
                self._tell()
            del work  # it holds a part, while the next may be long in coming

    def _say(self, news: Whole | Done) -> None:
        self._news.put(news)
        self._tell()

    def _write(self, session: str, layout: Layout, part: EndsPart, payload: torch.Tensor) -> None:
        upload = self._uploads.setdefault(session, _Upload(None, layout.bytes))
        spec = layout.tensors[part.tensor]
        upload.left -= part.size
        try:
            if upload.file is None:
                upload.file = self._file()
            upload.file.seek(layout.offsets[part.tensor] + part.offset)
            upload.file.write(byte_view(payload))
            if not upload.left:
                upload.file.flush()  # that it does not fit is to be known before it is a member's
        except OSError as error:  # a full disk, say, which is no reason to end the run
            upload.why = upload.why or f"not kept: {error.strerror}"
        if not torch.isfinite(payload.view(DTYPES[spec.dtype])).all():
            upload.why = upload.why or "not finite"
        self._credit(session, part.size)
        if not upload.left:
            self._say(Whole(session, upload.why))

    def _forget(self, session: str) -> None:
        upload = self._uploads.pop(session, None)
        if upload is not None and upload.file is not None:
            with contextlib.suppress(OSError):  # of what it has yet to write
                upload.file.close()

    def _sum(self, tensor: torch.Tensor) -> None:
        """Over all replicas, in place."""
        if self._replicas is not None:
            self._replicas.all_reduce_tensors([tensor])

    def _agree(self, layout: Layout | None) -> Layout | None:
        """The layout of the first replica that has one."""
        if self._replicas is None:
            return layout
        mine = b"" if layout is None else layout.to_bytes()
        sizes = torch.zeros(self._replicas.size, dtype=torch.int64)
        sizes[self._replicas.rank] = len(mine)
        self._sum(sizes)
        first = next((rank for rank, size in enumerate(sizes.tolist()) if size), None)
        if first is None:
            return None
        said = torch.zeros(int(sizes[first]), dtype=torch.uint8)
        if first == self._replicas.rank:
            said.copy_(torch.frombuffer(bytearray(mine), dtype=torch.uint8))
        self._sum(said)  # the others add nothing
        return Layout.from_bytes(bytes(byte_view(said)))

    def _average(self, number: int, layout: Layout | None, weights: dict[str, int], void: bool) -> None:
        agreed = self._agree(layout)
        fits = layout is None or layout == agreed
        members = [(_whole(self._uploads[session]), weight) for session, weight in weights.items()] if fits else []
        total = torch.tensor([sum(weight for _, weight in members), len(members), void], dtype=torch.int64)
        self._sum(total)
        targets, count, voids = total.tolist()
        if voids:
            self._say(Done(None, 0, 0, void=True))
            return
        average = None
        if agreed is not None and targets:
            with self._said():
                average = self._mean(number, agreed, members, targets)
        for session in list(self._uploads):
            self._forget(session)
        self._say(Done(average, count, targets, fits))

    def _mean(self, number: int, layout: Layout, members: Sequence[tuple[BinaryIO, int]], total: int) -> Average:
        """``sum_i n_i theta_i / sum_i n_i``, slice by slice, in float32 (float64 for float64)."""
        out = self._file()
        for spec, begin in zip(layout.tensors, layout.offsets, strict=True):
            for first in range(0, spec.elements, _SLICE):
                count = min(_SLICE, spec.elements - first)
                mean = torch.zeros(count, dtype=torch.float64 if spec.dtype == "float64" else torch.float32)
                for file, weight in members:
                    theta = self._read(file, spec, begin, first, count)
                    mean.add_(theta.to(mean.dtype), alpha=weight / total)
                self._sum(mean)
                out.write(byte_view(mean.to(DTYPES[spec.dtype])))
        return self._mapped(number, layout, out)

    @staticmethod
    def _read(file: BinaryIO, spec: TensorSpec, begin: int, first: int, count: int) -> torch.Tensor:
        item = ITEM_BYTES[spec.dtype]
        theta = torch.empty(count, dtype=DTYPES[spec.dtype])
        file.seek(begin + first * item)
        view: Any = byte_view(theta)
        read = file.readinto(view)  # type: ignore[attr-defined]
        assert read == len(view), "a whole upload is shorter than its layout"
        return theta

    def _map(self, number: int, layout: Layout, contents: Sequence[memoryview]) -> Average:
        out = self._file()
        for content in contents:
            out.write(content)
        return self._mapped(number, layout, out)

    @staticmethod
    def _mapped(number: int, layout: Layout, file: BinaryIO) -> Average:
        file.flush()
        # Private and writable: torch warns of memory that it could not write to.
        memory = mmap.mmap(file.fileno(), layout.bytes, access=mmap.ACCESS_COPY)
        file.close()
        return Average(number, layout, memoryview(memory))

    def _said(self) -> contextlib.AbstractContextManager[None]:
        return said_if_unwritable(f"The average of the clients' ends in {self._directory}")

    def _file(self) -> BinaryIO:
        return tempfile.TemporaryFile(dir=self._directory)


def _whole(upload: _Upload) -> BinaryIO:
    assert upload.file is not None
    return upload.file
