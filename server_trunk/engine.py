"""The trunk's arithmetic: forward and backward of a batch. Only the trunk's thread calls it.

The objective of a step is ``sum_i n_i L_i / sum_i n_i`` with ``n_i`` the target tokens of client ``i``. A client sends the
gradient of its own loss, which is a sum over targets divided by some ``d``; it is scaled by ``d`` here, summed over
everything that comes, and divided by the counted targets when the step closes. So it does not matter how the work was batched.

A batch whose graph is kept waits for its backward as it is; of any other the members' hidden states are kept, and its forward
runs again. A batch for which the device has no memory is run again in smaller pieces.

On a CPU one batch may begin while another still runs: a lane that has nothing to do then need not wait for the slower ones.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from peft import PeftModel

from server_trunk.decoding import Decoding, Run
from server_trunk.gradients import GradientSum, is_usable, summed, unscaled
from server_trunk.members import NOT_FINITE, BackwardBatch, ForwardBatch, Member
from server_trunk.pieces import Lanes, Piece, Place, cut, gather, is_out_of_memory, let_go, places_of, results_of, scatter
from server_trunk.training import Early, StepReport, Training
from server_trunk.transfers import CudaTransfers, Landing, Transfers
from server_trunk.underway import Underway, done, failed
from splitfl.errors import GroupLost
from splitfl.parts.dropout import dropout_key
from splitfl.parts.packed import run_segments
from splitfl.parts.rows import Rows
from splitfl.parts.trunk import find_trunk

__all__ = ["Engine"]


class Engine:
    """The loaded trunk. ``training`` owns what is trained in it."""

    def __init__(
        self,
        model: torch.nn.Module,
        training: Training,
        device: torch.device,
        *,
        seed: int = 0,
        drops: bool = False,
        lanes: int | Lanes = 1,
        in_place: bool = False,
        may_recompute: bool = True,
        may_shrink: bool = True,
        choose_packed: Callable[[Sequence[tuple[int, int]]], bool] = lambda wire: False,
        report: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        """
        Args:
            drops: whether anything in the trunk is dropped out, keyed by ``seed``.
            lanes: pieces of a batch that run side by side on a CPU; or what runs them.
            in_place: gradients are added up where they stand, which saves one more set of them in memory; running out of it amid
                a backward then ends the run.
            may_recompute: whether a forward may run again for its backward: not where the weights may have moved on meanwhile.
            may_shrink: whether a batch for which the device has no memory is run again in smaller pieces.
            choose_packed: whether a run of these segments is packed or padded.
            report: told of the new most tokens of a piece when the device was out of memory.
        """
        self._model = model
        self._trunk = find_trunk(model)
        self.training = training
        self._device = device
        self._seed, self._drops = seed, drops
        self._in_place, self._may_recompute, self._may_shrink = in_place, may_recompute, may_shrink
        self._choose_packed, self._report = choose_packed, report
        self._transfers = (CudaTransfers if device.type == "cuda" else Transfers)(device)
        if isinstance(lanes, int):
            lanes = Lanes(lanes if device.type == "cpu" else 1, torch.get_num_threads())
        self._lanes = lanes
        self._graphs: dict[int, list[Piece]] = {}
        self._early: Early | None = None  # of the newest backward
        self._most: int | None = None  # tokens of a piece, once the device was out of memory
        self.make_room: Callable[[], int] = lambda: 0  # gives up what is kept for later; returns how many tokens that was
        self.is_atomic = not in_place  # whether a backward that fails has left the step's sum as it was
        self.closed: int | None = -1  # the step after which the weights stand; None where one failed midway
        model.eval()

    # --- what runs side by side -------------------------------------------------------------------------------------------------

    @property
    def has_room(self) -> bool:
        """Whether another batch may begin: a lane has nothing to do."""
        return self._lanes.is_free

    def runs_beside(self, batch: ForwardBatch | BackwardBatch) -> bool:
        """Whether the batch may begin while others run. If not, and it begins all the same, it waits for their end."""
        member = batch.members[0]
        last = isinstance(batch, BackwardBatch) and batch.last
        return not last and self._is_parallel(member) and self._model.training == member.forward.train

    def _is_parallel(self, member: Member) -> bool:
        """Whether batches of its kind run in the lanes while the caller goes on. Evaluation does not: it answers sooner alone."""
        plain = member.forward.adapter_on or not isinstance(self._model, PeftModel)
        return self._lanes.count > 1 and not self._lanes.apart and member.forward.grad and plain

    def _start(
        self,
        work: Callable[[Piece], torch.Tensor],
        pieces: Sequence[Piece],
        member: Member,
        heard: Callable[[], None],
        amid: contextlib.AbstractContextManager[None] | None = None,
    ) -> list[Future[torch.Tensor]]:
        """``work`` on each piece of a batch of this member's kind: begun, or, ``amid`` something or where it cannot run beside
        others, done.
        """
        # A single piece has all threads where nothing runs, else the lane that is free.
        if amid is None and self._is_parallel(member) and (len(pieces) > 1 or not self._lanes.are_idle):
            self._turn_to(member)
            return self._lanes.begin(work, pieces, heard)
        self._lanes.settle()
        try:
            with self._mode(member), amid or contextlib.nullcontext():
                return [done(out) for out in self._lanes.run(work, pieces)]
        except Exception as error:
            return [failed(error)]

    # --- forward ----------------------------------------------------------------------------------------------------------------

    def forward(self, batch: ForwardBatch) -> tuple[Landing, bool]:
        """Run the trunk on the members together; returns each member's ``y: (tokens, hidden)`` on its way to host memory, and
        whether the graph is kept.

        It is where ``batch.keep`` asks for it, unless the device had no memory for it; then :meth:`backward` or :meth:`discard`
        must follow under the same number. A training member whose hidden states are not finite, or absurdly large, is marked
        ``spoilt`` and gets NaN.
        """
        return self.begin_forward(batch).result()

    def begin_forward(self, batch: ForwardBatch, heard: Callable[[], None] = lambda: None) -> Underway[tuple[Landing, bool]]:
        """Begin what :meth:`forward` does. ``heard`` is called, in any thread, when a part of it has run."""
        members = batch.members
        began = self._transfers.begin()
        for member in members:
            if member.forward.grad and not is_usable(member.hidden):
                # In the backward its rows have a gradient of zero, but zero times NaN would be NaN in what all share.
                member.hidden.zero_()
                member.spoilt = NOT_FINITE
        pieces: list[Piece] = []
        running: list[Future[torch.Tensor]]
        try:
            pieces = self._cut(members)
            running = self._start(lambda piece: self._run(piece, grad=batch.keep), pieces, members[0], heard)
        except Exception as error:
            running = [failed(error)]
        return Underway(running, lambda: self._finish_forward(batch, pieces, running, began))

    def _finish_forward(
        self, batch: ForwardBatch, pieces: list[Piece], running: Sequence[Future[torch.Tensor]], began: Any
    ) -> tuple[Landing, bool]:
        members, keep = batch.members, batch.keep
        try:
            out = results_of(running)
        except Exception as error:
            if not self._may_try_smaller(error) or (batch.has_backward and not self._may_recompute):
                raise
            let_go(error)
            # What fills a device is graphs, so this one is not kept either.
            keep = False
            pieces, out = self._in_smaller_pieces(members, pieces, lambda piece: self._run(piece, grad=False))
        if keep:
            self._graphs[batch.number] = pieces
        rows = zip(members, _by_member(pieces, out, members), strict=True)
        return self._transfers.down([torch.full_like(y, math.nan) if member.spoilt else y for member, y in rows], began), keep

    def _run(self, piece: Piece, *, grad: bool) -> torch.Tensor:
        with torch.set_grad_enabled(grad):
            piece.out = run_segments(self._model, piece.hidden, piece.rows)
        return piece.out.detach()

    def decode(self, runs: Sequence[Run]) -> Landing:
        """Run the next tokens of sequences whose keys and values are kept, of one kind, and write theirs behind them; returns
        each run's ``y: (tokens, hidden)`` on its way to host memory.
        """
        self._lanes.settle()  # it answers sooner alone
        began = self._transfers.begin()
        member = runs[0].of
        hidden = [self._transfers.up(run.of.hidden[run.begin : run.begin + run.length]) for run in runs]
        owners = tuple(run.of.client for run in runs) if member.forward.adapter_on else ("",) * len(runs)
        wire = tuple((run.length, run.start) for run in runs)
        rows = Rows(wire, True, owners, past=tuple(run.follows for run in runs))
        with self._mode(member), torch.no_grad():
            out = run_segments(self._model, hidden[0] if len(hidden) == 1 else torch.cat(hidden), rows)
        return self._transfers.down(list(out.split([run.length for run in runs])), began)

    # --- backward ---------------------------------------------------------------------------------------------------------------

    def backward(self, batch: BackwardBatch) -> Landing:
        """Add the batch's gradients; returns each member's unweighted ``dh: (tokens, hidden)`` on its way to host memory, None
        where nobody wants it.

        A gradient that is not finite (or absurdly large) counts as zero, and so does one where no token is a target: the
        objective has no place for it. Its member is marked ``spoilt``. A replayed member adds nothing to the sum: what it would
        add is there already. After a batch that is likely to be its step's ``last``, :meth:`release` should follow.
        """
        return self.begin_backward(batch).result()

    def begin_backward(self, batch: BackwardBatch, heard: Callable[[], None] = lambda: None) -> Underway[Landing]:
        """Begin what :meth:`backward` does, which counts once it is asked for its result. ``heard``: as in
        :meth:`begin_forward`.
        """
        members = batch.members
        began = self._transfers.begin()
        gradients: list[torch.Tensor] = []
        pieces = self._graphs.pop(batch.number, []) if batch.kept else []
        owners = sorted({member.client for member in members if not member.replayed})
        early = self._early = self.training.early(in_place=self._in_place) if batch.last else None
        total = GradientSum(self.training.parameters_of(owners) if owners else [], self._in_place, early)

        def differentiate(piece: Piece) -> torch.Tensor:
            if piece.out is None:
                self._run(piece, grad=True)
            weights = torch.zeros_like(piece.hidden) if piece.idle else gather(gradients, piece.places)
            own = total.differentiate(_taken(piece.out), piece.hidden, weights)
            piece.out = None  # the graph is used up
            return own

        running: list[Future[torch.Tensor]]
        try:
            gradients += [self._transfers.up(summed(member)) for member in members]
            pieces = pieces or self._cut(members)
            running = self._start(differentiate, pieces, members[0], heard, None if early is None else early.amid(len(pieces)))
        except Exception as error:
            running = [failed(error)]
        return Underway(running, lambda: self._finish_backward(batch, pieces, running, total, differentiate, began))

    def _finish_backward(
        self,
        batch: BackwardBatch,
        pieces: list[Piece],
        running: Sequence[Future[torch.Tensor]],
        total: GradientSum,
        differentiate: Callable[[Piece], torch.Tensor],
        began: Any,
    ) -> Landing:
        members = batch.members
        # It counts last, as all within takes memory: a batch that fails must not have counted.
        with total.whole():
            try:
                found = results_of(running)
            except Exception as error:
                if not self._may_try_smaller(error) or self._in_place:
                    raise
                let_go(error)
                if batch.kept and pieces:
                    # Only the pieces still hold what went in.
                    rows = _by_member(pieces, [piece.hidden.detach() for piece in pieces], members)
                    for member, hidden in zip(members, rows, strict=True):
                        member.hidden = hidden
                pieces, found = self._in_smaller_pieces(members, pieces, differentiate, total.clear)
            rows = _by_member(pieces, found, members)
            return self._transfers.down([unscaled(member, own) for member, own in zip(members, rows, strict=True)], began)

    def release(self) -> None:
        """The step's sum leaves, as far as it has not: it is likely to be whole."""
        early, self._early = self._early, None
        if early is not None:
            early.leave()

    def discard(self, number: int) -> None:
        """Free a graph whose backward will never come."""
        self._graphs.pop(number, None)

    @staticmethod
    def is_lost(error: Exception) -> bool:
        """Whether the device itself has failed (a CUDA error is never recovered from), or another process, not only one batch."""
        # Newer torch has a class of its own for it; being out of memory is none of them.
        kind = getattr(torch, "AcceleratorError", None)
        device = kind is not None and isinstance(error, kind) and not isinstance(error, torch.OutOfMemoryError)
        return device or isinstance(error, GroupLost)

    def close(self) -> None:
        """End its threads; nothing runs any more."""
        self._lanes.close()

    # --- the step ---------------------------------------------------------------------------------------------------------------

    def close_step(self, step: int, targets: Mapping[str, int]) -> StepReport:
        """Divide by the counted targets (by client), clip, step, and clear the gradients for the next step."""
        try:
            report = self.training.close(step, targets)
        except BaseException:
            if self.training.moved():
                self.closed = None
            raise
        self.closed = step
        return report

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
        """What a checkpoint holds of the trunk: the trained weights by name, and the optimizer's and generator's state."""
        tensors, extra = self.training.state()
        return tensors, extra | {"generator": torch.get_rng_state()}

    # --- pieces -----------------------------------------------------------------------------------------------------------------

    def _cut(self, members: Sequence[Member], most: int | None = None) -> list[Piece]:
        """The batch as pieces to run: one a lane, or smaller ones where the device was out of memory before."""
        limit = most if most is not None else self._most
        hidden = [self._transfers.up(member.hidden) for member in members]
        places = places_of(members)
        padded = not self._choose_packed([(place.length, place.start) for place in places])
        groups = cut(places, self._lanes.count, limit, padded=padded, uneven=self._lanes.apart)
        pieces = [self._piece(members, hidden, group) for group in groups]
        while self._lanes.apart and len(pieces) < self._lanes.count:
            pieces.append(self._piece(members, hidden, [min(places, key=lambda place: place.length)]))
            pieces[-1].idle = True
        return pieces

    def _piece(self, members: Sequence[Member], hidden: Sequence[torch.Tensor], places: list[Place]) -> Piece:
        kind = members[0].forward
        wire = tuple((place.length, place.start) for place in places)
        keys = None
        if kind.train and self._drops:
            keys = tuple(
                dropout_key(self._seed, member.forward.step, member.client, member.ordinal, place.number)
                for place, member in ((place, members[place.member]) for place in places)
            )
        owners = tuple(members[place.member].client for place in places) if kind.adapter_on else ("",) * len(places)
        rows = Rows(wire, self._choose_packed(wire), owners, keys)
        return Piece(places, rows, gather(hidden, places).detach().requires_grad_(kind.grad))

    def _in_smaller_pieces(
        self,
        members: Sequence[Member],
        pieces: Sequence[Piece],
        work: Callable[[Piece], torch.Tensor],
        start_over: Callable[[], None] = lambda: None,
    ) -> tuple[list[Piece], list[torch.Tensor]]:
        """Run a batch that was too large for the device one piece at a time, smaller until it fits; returns the pieces, and what
        ``work`` returned of each. ``start_over`` is called before each attempt. What is kept for later goes first: if that makes
        room, no batch need be smaller.

        Raises what the device raised where even the smallest does not fit.
        """
        self._lanes.settle()  # what runs beside it takes memory too
        most = max((piece.tokens for piece in pieces), default=sum(member.tokens for member in members))
        for piece in pieces:
            piece.out = None
        made_room = bool(self.make_room())
        while True:
            if not made_room:
                most //= 2
            self._free()
            start_over()
            smaller = self._cut(members, max(1, most))
            try:
                with self._mode(members[0]):
                    results = [work(piece) for piece in smaller]
            except Exception as error:
                if not is_out_of_memory(error) or most < max(piece.tokens for piece in smaller):
                    raise  # not even a segment alone has room
                made_room = False
                continue
            if not made_room:  # batches to come are cut as small from the start
                self._most = most if self._most is None else min(self._most, most)
                self._report(self._most)
            return smaller, results

    def _may_try_smaller(self, error: Exception) -> bool:
        return self._may_shrink and is_out_of_memory(error)

    def _free(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _turn_to(self, member: Member | Decoding) -> None:
        """Dropout on or off, as the member's kind has it."""
        if self._model.training != member.forward.train:
            self._lanes.settle()
            self._model.train(member.forward.train)

    @contextlib.contextmanager
    def _mode(self, member: Member | Decoding) -> Iterator[None]:
        """The model in the mode of the member's kind: dropout on or off, the adapter on or off."""
        self._turn_to(member)
        with contextlib.ExitStack() as stack:
            if not member.forward.adapter_on and isinstance(self._model, PeftModel):
                stack.enter_context(self._model.disable_adapter())
            yield


def _by_member(pieces: Sequence[Piece], rows: Sequence[torch.Tensor], members: Sequence[Member]) -> list[torch.Tensor]:
    """Each member's own rows, from those of each piece."""
    return scatter([(piece.places, own) for piece, own in zip(pieces, rows, strict=True) if not piece.idle], members)


def _taken(out: torch.Tensor | None) -> torch.Tensor:
    assert out is not None, "a piece that has not run"
    return out
