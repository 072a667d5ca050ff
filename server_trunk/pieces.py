"""A batch cut into pieces of whole segments, run side by side or one after another.

On a CPU the pieces run side by side, a thread each: two threads that each run half the rows never wait for each other inside an
operation, as two threads that share every operation do. Where memory is short they run one after another, smaller each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from server_trunk.members import Member
from splitfl.parts.packing_rule import split_balanced
from splitfl.parts.rows import Rows

__all__ = ["Lanes", "Piece", "Place", "cut", "gather", "is_out_of_memory", "let_go", "results_of", "scatter"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """One segment of a batch: the ``number``-th of its member, whose rows ``begin..begin+length`` it is."""

    member: int
    number: int
    begin: int
    length: int
    start: int


@dataclass(slots=True)
class Piece:
    """Some segments of a batch. ``hidden: (tokens, H)`` on the device; ``out`` likewise, with its graph where that is kept.

    ``idle``: it runs only to keep step with other ranks; its rows run elsewhere too, and its gradient is zero.
    """

    places: list[Place]
    rows: Rows
    hidden: torch.Tensor
    out: torch.Tensor | None = None
    idle: bool = False

    @property
    def tokens(self) -> int:
        return self.rows.tokens


def places_of(members: Sequence[Member]) -> list[Place]:
    """All segments of a batch, member by member."""
    places = []
    for index, member in enumerate(members):
        begin = 0
        for number, (length, start) in enumerate(member.forward.segments):
            places.append(Place(index, number, begin, length, start))
            begin += length
    return places


def cut(
    places: Sequence[Place], lanes: int, most: int | None = None, *, padded: bool = True, uneven: bool = False
) -> list[list[Place]]:
    """Cut into ``lanes`` groups of about equal cost, and further where a group would have over ``most`` tokens, pads counted.

    Segments of like length stay together, so that little is padded. One group where segments are too few or too unequal to
    keep the lanes busy, unless ``uneven``: the threads then share every operation.
    """
    if len(places) < 2 or (lanes <= 1 and most is None):
        return [list(places)]
    lengths = [place.length for place in places]
    groups = [[places[index] for index in group] for group in split_balanced(lengths, lanes, padded=padded)]
    if most is not None:
        return [run for group in groups for run in _runs(group, most)]
    # Where one lane would work much longer than the others, the threads share every operation instead.
    return [list(places)] if not uneven and max(map(_tokens, groups)) * lanes > sum(lengths) * 1.5 else groups


def _tokens(places: Sequence[Place]) -> int:
    return sum(place.length for place in places)


def _runs(places: Sequence[Place], most: int) -> list[list[Place]]:
    """Segments of like length together, in groups that take at most ``most`` tokens, pads counted; or one segment each."""
    groups: list[list[Place]] = []
    for place in sorted(places, key=lambda place: -place.length):
        if not groups or (len(groups[-1]) + 1) * groups[-1][0].length > most:
            groups.append([])
        groups[-1].append(place)
    # In the order of the batch again: rows that lie together are gathered without a copy.
    return [sorted(group, key=lambda place: (place.member, place.number)) for group in groups]


def gather(tensors: Sequence[torch.Tensor], places: Sequence[Place]) -> torch.Tensor:
    """The rows of some segments, one after another: ``(tokens, H)``. A view where they lie together in one tensor."""
    parts: list[torch.Tensor] = []
    run: tuple[int, int, int] | None = None
    for place in [*places, None]:
        if run is not None and place is not None and (place.member, place.begin) == (run[0], run[2]):
            run = (run[0], run[1], place.begin + place.length)
            continue
        if run is not None:
            parts.append(tensors[run[0]][run[1] : run[2]])
        if place is not None:
            run = (place.member, place.begin, place.begin + place.length)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def scatter(pieces: Sequence[tuple[Sequence[Place], torch.Tensor]], members: Sequence[Member]) -> list[torch.Tensor]:
    """The inverse: each member's own rows ``(tokens, H)``, from the rows of all pieces, contiguous and on their device."""
    found: list[dict[int, torch.Tensor]] = [{} for _ in members]
    for places, rows in pieces:
        for place, part in zip(places, rows.split([place.length for place in places]), strict=True):
            found[place.member][place.begin] = part
        if len(pieces) == 1 and len(members) == 1:
            return [rows.contiguous()]
    return [torch.cat([parts[begin] for begin in sorted(parts)]) for parts in found]


class Lanes:
    """``count`` threads that run pieces side by side, ``threads`` of the CPU between them; one lane is the caller itself.

    ``apart``: the lanes are processes, each of which needs a piece of every batch.
    """

    apart = False

    def __init__(self, count: int, threads: int) -> None:
        self.count = max(1, count)
        self._busy: set[Future[Any]] = set()  # the caller's thread alone looks at it
        each = max(1, threads // self.count)
        self._pool: ThreadPoolExecutor | None = None
        if self.count > 1:
            self._pool = ThreadPoolExecutor(self.count, "trunk-lane", initializer=torch.set_num_threads, initargs=(each,))

    @property
    def is_free(self) -> bool:
        """Whether a lane has nothing to do, so that more may be begun."""
        self._busy = {future for future in self._busy if not future.done()}
        return len(self._busy) < self.count

    @property
    def are_idle(self) -> bool:
        """Whether nothing runs."""
        return all(future.done() for future in self._busy)

    def begin(self, work: Callable[[T], Any], items: Sequence[T], heard: Callable[[], None]) -> list[Future[Any]]:
        """Have ``work`` done on each item, after what was begun before; ``heard`` is called, in a lane's thread, as each ends."""
        assert self._pool is not None, "one lane is the caller itself"
        futures = [self._pool.submit(work, item) for item in items]
        self._busy.update(futures)
        for future in futures:
            future.add_done_callback(lambda _: heard())
        return futures

    def settle(self) -> None:
        """Wait until all that was begun has ended, well or not."""
        wait(self._busy)

    def run(self, work: Callable[[T], Any], items: Sequence[T]) -> list[Any]:
        """``[work(item) for item in items]``; the first error is raised once all have ended."""
        if self._pool is None or len(items) < 2:
            self.settle()  # the caller's own operations use all threads
            return [work(item) for item in items]
        return results_of(self.begin(work, items, lambda: None))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


def results_of(futures: Sequence[Future[Any]]) -> list[Any]:
    """What they return; the first error is raised once all have ended."""
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    if errors:
        for error in errors[1:]:  # nobody will see them
            let_go(error)
        raise errors[0]
    return [future.result() for future in futures]


def let_go(error: BaseException | None) -> None:
    """Free what a failed attempt had computed, which the frames of its traceback hold for as long as anybody holds the error, or
    until Python looks for cycles.
    """
    # To clear the frames would not do: they go on holding their functions, those what they close over, and their callers' frames.
    while error is not None:
        error.__traceback__ = None
        error = error.__context__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller piece might succeed: the device's own error, or the CPU allocator's, which has no class."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
