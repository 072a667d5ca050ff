"""What the trunk runs: batches begun, answered once they have run, and what becomes of one that cannot run.

On a CPU two batches may be under way: one begins when the other leaves a lane idle.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from server_trunk.async_steps import AsyncSteps
from server_trunk.decoding import Decoder
from server_trunk.engine import Engine
from server_trunk.kvcache import CacheBook
from server_trunk.members import BackwardBatch, ForwardBatch, Member
from server_trunk.meter import Meter
from server_trunk.outlet import Outlet
from server_trunk.pieces import is_out_of_memory, let_go
from server_trunk.scheduler import Scheduler
from server_trunk.stepkeeper import StepKeeper
from server_trunk.steps import Steps
from server_trunk.transfers import Landing, Mailer
from server_trunk.underway import Underway
from splitfl.errors import kind_and_line
from splitfl.protocol.messages import Grad, Hidden
from splitfl.runlog import RunLog

__all__ = ["Batches"]

#: Session, message, and the tensor that is its payload.
_Reply = tuple[str, Any, Any]


class Batches:
    """Called from the trunk's thread. ``names``: clients by open session. ``end(session, code, text)`` ends a session; ``wake()``
    lets the thread look around, and is called from any.
    """

    def __init__(
        self,
        engine: Engine,
        steps: Steps | AsyncSteps,
        scheduler: Scheduler,
        keeper: StepKeeper,
        outlet: Outlet,
        meter: Meter,
        log: RunLog,
        *,
        names: Mapping[str, str],
        payload_of: Callable[[Any], Any],
        end: Callable[[str, str, str], None],
        wake: Callable[[], None],
        caches: CacheBook | None = None,
    ) -> None:
        self._engine, self._steps, self._scheduler, self._keeper = engine, steps, scheduler, keeper
        self._outlet, self._meter, self._log = outlet, meter, log
        self._names, self._payload_of, self._end, self._wake = names, payload_of, end, wake
        # Without a barrier, any batch may be the one after which the optimizer steps.
        self._may_overlap = isinstance(steps, Steps)
        self._begun: deque[tuple[Underway[Any], Callable[[], None]]] = deque()  # batches under way, and what follows each
        self._mailer = Mailer(wake)
        caches = caches or CacheBook(0, 0)
        engine.make_room = caches.evict_idle
        self.decoder = Decoder(
            engine,
            caches,
            outlet,
            self._mailer,
            payload_of=payload_of,
            may_evaluate=steps.may_evaluate,
            end=end,
            log=log.write,
            meter=meter,
        )

    @property
    def are_underway(self) -> bool:
        return bool(self._begun)

    @property
    def have_room(self) -> bool:
        """Whether another may begin."""
        return self._engine.has_room

    @property
    def may_go_on(self) -> bool:
        """Whether one has ended, or another may begin."""
        if self._decodes or (self._begun and self._begun[0][0].is_done):
            return True
        return self.have_room and self._trains

    @property
    def has_work(self) -> bool:
        """Whether something waits that may run. If not, the scheduler's ``due`` says when it will, should nothing come."""
        return self._decodes or self._trains

    @property
    def _decodes(self) -> bool:
        due = self.decoder.due
        # A batch of training that began now would hold up a token that waits for others.
        return due is not None and (self.are_underway or due <= time.monotonic() or self._trains)

    @property
    def _trains(self) -> bool:
        """Whether something beside decoding waits that may run."""
        return self._scheduler.has_work(self._may_run, time.monotonic(), more_expected=self._steps.expects_forwards)

    def _may_run(self, member: Member) -> bool:
        if member.forward.grad:
            return self._steps.is_running(member.session, member.forward.step)
        return self._steps.may_evaluate(member.forward.step)

    def go_on(self) -> None:
        """Answer what has run, and begin the next batch if one may."""
        self._mailer.check()
        if self._decodes:
            self.decoder.turn()
        self.settle(wait=False)
        self._begin()
        self.settle(wait=not self._may_overlap)

    def close(self) -> None:
        """Send the answers that are left. Nothing runs any more."""
        self._mailer.close()

    def _begin(self) -> None:
        """Begin the next batch, if one may."""
        if not self.have_room:
            return
        work = self._scheduler.next(self._may_run, time.monotonic(), more_expected=self._steps.expects_forwards)
        if work is None:
            return
        if isinstance(work, BackwardBatch):
            if work.is_void:
                self._engine.discard(work.number)
                return
            work.last = self._steps.ends_with(work.members)
        if not self._engine.runs_beside(work):
            self.settle()  # the answers of what runs do not wait for this
        began = time.monotonic()
        if isinstance(work, ForwardBatch):
            forward = self._engine.begin_forward(work, self._wake)
            self._begun.append((forward, functools.partial(self._forward_ran, work, forward, began)))
        else:
            backward = self._engine.begin_backward(work, self._wake)
            self._begun.append((backward, functools.partial(self._backward_ran, work, backward, began)))

    def settle(self, *, wait: bool = True) -> None:
        """Answer the batches that have run, in the order in which they began; ``wait``: all of them."""
        while self._begun and (wait or self._begun[0][0].is_done):
            _, follow = self._begun.popleft()
            follow()

    def _forward_ran(self, batch: ForwardBatch, underway: Underway[tuple[Landing, bool]], began: float) -> None:
        try:
            landing, kept = underway.result()
        except Exception as error:
            if self._engine.is_lost(error):
                raise
            self._fail(batch, error)
            return
        if batch.keep and not kept:
            self._scheduler.unkeep(batch)
        if batch.has_backward:
            self._scheduler.ran(batch)
        replies: list[_Reply] = []
        for member, out in zip(batch.members, landing.tensors, strict=True):
            forward = member.forward
            if kept or not batch.has_backward:
                member.hidden = None  # the graph holds what it needs
            self._keeper.ran(tokens=member.tokens)
            if forward.grad:
                self._steps.forward_ran(member.session, forward.step, member.ordinal)
            reply = Hidden(forward.step, forward.micro, forward.rows, forward.hidden, forward.dtype, forward.codec)
            replies.append((member.session, reply, out))
            self._outlet.credit(member.session, forward.payload_bytes)
        if batch.has_backward:
            for session in dict.fromkeys(member.session for member in batch.members):
                self._keeper.abandon_if_all_arrived(session)
        self._mailer.send(landing, functools.partial(self._leave, "forward", batch.members, began, landing, replies))

    def _leave(self, kind: str, members: list[Member], began: float, landing: Landing, replies: list[_Reply]) -> None:
        """Send the answers of a batch; in the mailer's thread where they had yet to land."""
        took = landing.took()
        self._keeper.ran(seconds=took)
        self._meter.ran(kind, members, began=began, seconds=took)
        for session, reply, tensor in replies:
            self._outlet.send(session, reply, self._payload_of(tensor))

    def _fail(self, batch: ForwardBatch, error: Exception) -> None:
        """A batch the trunk cannot run, though what decoding keeps was given up where there was no memory: its members are tried
        alone, and whoever fails alone loses its session.
        """
        self._engine.discard(batch.number)
        let_go(error)  # else it would be held while others run in its place
        if is_out_of_memory(error) and self._engine.make_room():
            self._forward_ran(batch, self._engine.begin_forward(batch), time.monotonic())
            return
        if len(batch.members) > 1:
            for alone in self._scheduler.split(batch):
                self._forward_ran(alone, self._engine.begin_forward(alone), time.monotonic())
            return
        (member,) = batch.members
        if batch.has_backward:
            self._scheduler.ran(batch)
        said = kind_and_line(error)
        self._log.write("forward-failed", client=self._names.get(member.session), error=said)
        text = f"the trunk cannot run this batch ({said}); use a smaller batch, or ask the operator to look at the log"
        self._end(member.session, "batch", text)

    def _backward_ran(self, batch: BackwardBatch, underway: Underway[Landing], began: float) -> None:
        try:
            landing = underway.result()
        except Exception as error:
            if self._engine.is_lost(error) or not self._engine.is_atomic:
                raise
            self._fail_backward(batch, error)
            return
        replies: list[_Reply] = []
        for member, gradient in zip(batch.members, landing.tensors, strict=True):
            back = member.backward
            if back is None:
                continue
            counted = 0 if member.spoilt else back.targets
            if member.spoilt:
                self._keeper.tell_uncounted(member, back)
            self._steps.backward_ran(member.session, back.step, member.ordinal, counted)
            if gradient is None:
                continue  # the client's input end is frozen: nobody awaits it
            reply = Grad(back.step, back.micro, back.rows, back.hidden, back.dtype, back.codec)
            replies.append((member.session, reply, gradient))
        self._mailer.send(landing, functools.partial(self._leave, "backward", batch.members, began, landing, replies))
        self._engine.release()  # the clients' answers before it

    def _fail_backward(self, batch: BackwardBatch, error: Exception) -> None:
        """A backward that cannot run: nothing of it has counted, and its members lose their sessions, nobody else."""
        self._engine.discard(batch.number)
        let_go(error)
        if is_out_of_memory(error):
            self._engine.make_room()  # for others: what it was to start from is used up
        said = kind_and_line(error)
        for member in batch.members:
            if member.backward is not None:
                self._steps.backward_failed(member.session, member.backward.step, member.ordinal)
        for session in {member.session for member in batch.members if member.backward is not None}:
            self._log.write("backward-failed", client=self._names.get(session), error=said)
            if session in self._names:
                self._end(session, "batch", f"the trunk cannot run this batch backwards ({said}); use a smaller batch")
            else:
                self._steps.lose(session, time.monotonic())  # when it vanished, its part was still to be whole
