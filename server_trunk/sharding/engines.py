"""The engine of a trunk on several ranks: the leader's tells the others what it runs, and a follower runs what it is told.

All ranks run the same operations in the same order, since their models wait for each other inside them; afterwards each says
whether it went well. A forward that fails on one has failed on all, and is discarded; anything else that only some have done
ends the group, as their sums of gradients differ from then on. No rank makes a batch smaller by itself: being out of memory fails
the batch; a forward then runs again where caches were given up for it.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from server_trunk.decoding import Run
from server_trunk.engine import Engine
from server_trunk.members import BackwardBatch, ForwardBatch
from server_trunk.pieces import Lanes, Piece, is_out_of_memory, let_go
from server_trunk.sharding.commands import (
    describe_backward,
    describe_decode,
    describe_forward,
    read_backward,
    read_decode,
    read_forward,
)
from server_trunk.sharding.group import ShardGroup
from server_trunk.sharding.kept import FollowedSequences, LedSequence, Notes
from server_trunk.sharding.training import ShardedTraining
from server_trunk.training import StepReport
from server_trunk.transfers import Landing
from server_trunk.underway import Underway
from splitfl.errors import GroupLost, kind_and_line
from splitfl.parts.sharded import forget_run
from splitfl.parts.trunk import find_trunk

__all__ = ["LeadingEngine", "RankLanes", "follow"]

T = TypeVar("T")

#: How a rank says it went.
_WELL, _FAILED, _NO_MEMORY = 1, 0, -1


class RankLanes(Lanes):
    """A lane a rank: each runs one piece of a batch; the leader gets the rows of all."""

    apart = True

    def __init__(self, group: ShardGroup) -> None:
        super().__init__(1, torch.get_num_threads())
        self._group, self.count = group, group.size

    def run(self, work: Callable[[Any], Any], items: Any) -> list[Any]:
        """What ``work`` returned of each piece, on the leader; a follower knows its own alone."""
        pieces: list[Piece] = list(items)
        own = work(pieces[self._group.rank])
        rows = [None if piece.idle else torch.empty_like(piece.hidden) for piece in pieces]
        self._group.gather_rows(rows, own)
        done = [piece.hidden if found is None else found for piece, found in zip(pieces, rows, strict=True)]
        done[self._group.rank] = own
        return done


class LeadingEngine(Engine):
    """An :class:`Engine` whose every operation runs on all ranks of ``group``."""

    def __init__(self, *args: Any, group: ShardGroup, **options: Any) -> None:
        super().__init__(*args, **options)
        self._group = group
        self._notes = Notes()
        self._lost = False

    def forward(self, batch: ForwardBatch) -> tuple[Landing, bool]:
        self._send(*describe_forward(batch))
        return self._together("forward", lambda: super(LeadingEngine, self).begin_forward(batch).result())

    def backward(self, batch: BackwardBatch) -> Landing:
        self._send(*describe_backward(batch))
        return self._together("backward", lambda: super(LeadingEngine, self).begin_backward(batch).result())

    def begin_forward(self, batch: ForwardBatch, heard: Callable[[], None] = lambda: None) -> Underway[tuple[Landing, bool]]:
        return Underway([], lambda: self.forward(batch))

    def begin_backward(self, batch: BackwardBatch, heard: Callable[[], None] = lambda: None) -> Underway[Landing]:
        return Underway([], lambda: self.backward(batch))

    def new_sequence(self) -> LedSequence:
        """One that :meth:`decode` can go on, empty, on all ranks."""
        return LedSequence(self._notes)

    def decode(self, runs: Sequence[Run]) -> Landing:
        self._send(*describe_decode(runs))
        return self._together("decode", lambda: super(LeadingEngine, self).decode(runs))

    def discard(self, number: int) -> None:
        self._send({"do": "discard", "number": number})
        super().discard(number)

    def close_step(self, step: int, targets: Mapping[str, int]) -> StepReport:
        self._send({"do": "close", "step": step, "targets": dict(targets)})
        return self._together("close", lambda: super(LeadingEngine, self).close_step(step, targets))

    def train(self, what: str, *values: Any) -> Any:
        """Call a method of the training, on all ranks; ``values`` are plain. Returns what it returns here."""
        self._send({"do": "train", "what": what, "values": values})
        return self._together(what, lambda: getattr(self.training, what)(*values))

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
        self._send({"do": "state"})
        return self._together("state", super().state)

    # --- checkpoints in shards --------------------------------------------------------------------------------------------------

    def shares(self, folder: Path) -> bool:
        """Whether all ranks can write there: they are on one machine, or have the folder in common."""
        folder.mkdir(parents=True, exist_ok=True)
        sign = folder / f".shared-{secrets.token_hex(4)}"
        sign.touch()
        try:
            return all(self.train("sees", str(sign)))
        finally:
            sign.unlink()

    def outline(self) -> dict[str, Any]:
        """What a checkpoint holds beside what :meth:`write` has written."""
        return {"optimizer": self.training.outline(), "generator": torch.get_rng_state()}  # type: ignore[attr-defined]

    def write(self, directory: Path) -> dict[str, str]:
        """Each rank's own part of what is trained, with its optimizer's moments, into directories there.

        Returns the SHA-256 of all files by their path below ``directory``.
        """
        digests: dict[str, str] = self.train("write", str(directory))
        return digests

    def read(self, directory: Path, outline: Mapping[str, Any]) -> None:
        """Take back what :meth:`write` and :meth:`outline` gave, on any number of ranks."""
        steps = {index: float(entry["step"]) for index, entry in outline["state"].items()}
        self.train("read", str(directory), {"steps": steps, "param_groups": outline["param_groups"]})

    def stop(self) -> None:
        """Let the followers end. The last of its operations."""
        if not self._lost:
            with contextlib.suppress(GroupLost):  # they have ended
                self._send({"do": "stop"})

    def _send(self, command: dict[str, Any], tensors: Any = ()) -> None:
        self._group.use_device()
        try:
            self._group.send(command | {"sequences": self._notes.take()}, tensors)
        except GroupLost:
            self._give_up()
            raise

    def _together(self, what: str, work: Callable[[], T]) -> T:
        result: Any = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as failure:
            error = failure
        try:
            error = _settle(self._group, self._trunk, what, error, self.is_atomic)
        except GroupLost:
            self._give_up()
            raise
        if error is not None:
            raise error
        return result

    def _give_up(self) -> None:
        # Nobody knows what the others hold: the last checkpoint stands.
        self._lost, self.closed = True, None


def _settle(group: ShardGroup, trunk: Any, what: str, own: Exception | None, atomic: bool) -> Exception | None:
    """Once all have said how it went: the failure, of this rank or of another, after which all are of one state again.

    Raises GroupLost where they can no longer be.
    """
    votes = group.vote(_WELL if own is None else _NO_MEMORY if is_out_of_memory(own) else _FAILED)
    if min(votes) == _WELL:
        return None
    let_go(own)
    forget_run(trunk)  # on those too for whom it went well: what FSDP gathers ahead follows from what it has run
    failed = next(rank for rank, vote in enumerate(votes) if vote != _WELL)
    said = f" ({kind_and_line(own)})" if own is not None else ""
    text = f"rank {failed} of this trunk could not run a {what}{said}"
    if what in ("forward", "decode") or (what == "backward" and atomic and _WELL not in votes):
        return own or (torch.OutOfMemoryError if _NO_MEMORY in votes else RuntimeError)(text)
    raise GroupLost(f"{text}: start the group again") from own


def follow(engine: Engine, trunk: Any, group: ShardGroup) -> None:
    """A follower's whole work: run what the leader runs, until it stops. Raises GroupLost where the group cannot go on."""
    training = engine.training
    trunk = find_trunk(trunk)
    assert isinstance(training, ShardedTraining)
    group.use_device()
    sequences = FollowedSequences()

    def run(command: dict[str, Any], tensors: list[torch.Tensor]) -> None:
        match command["do"]:
            case "forward":
                engine.forward(read_forward(command, tensors))
            case "backward":
                engine.backward(read_backward(command, tensors))
            case "decode":
                engine.decode(read_decode(command, tensors, sequences))
            case "close":
                engine.close_step(command["step"], command["targets"])
            case "train":
                getattr(training, command["what"])(*command["values"])
            case "state":
                engine.state()
            case "load":
                training.take(command)

    while True:
        command, tensors = group.receive()
        what = command["do"]
        sequences.follow(command.get("sequences", ()))
        if what == "stop":
            engine.close()
            return
        if what == "discard":
            engine.discard(command["number"])
            continue
        error: Exception | None = None
        try:
            run(command, tensors)
        except Exception as failure:
            error = failure
        _settle(group, trunk, what, error, engine.is_atomic)
