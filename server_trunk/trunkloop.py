"""The trunk's thread: receive, process, schedule, compute, reply. The only owner of the engine, the scheduler and the steps.

Events come in from the gateway's thread through one bounded queue; answers leave through an :class:`Outlet`, whose methods may be
called from any thread. A session that breaks a rule is ended; nothing it does ends the loop.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Any

from server_trunk.absent import ANYBODY
from server_trunk.async_steps import AsyncSteps
from server_trunk.batches import Batches
from server_trunk.engine import Engine
from server_trunk.kvcache import CacheBook
from server_trunk.meter import Meter
from server_trunk.outlet import Outlet
from server_trunk.roundkeeper import RoundKeeper
from server_trunk.scheduler import Scheduler
from server_trunk.stepkeeper import NotKept, Run, StepKeeper
from server_trunk.steps import Steps
from splitfl.errors import CheckpointError, RemoteProtocolError, kind_and_line
from splitfl.protocol.messages import (
    AskNorm,
    Backward,
    EndsPart,
    Enrol,
    Fault,
    Forward,
    Leave,
    Pause,
    Release,
    StepDone,
)
from splitfl.runlog import RunLog

__all__ = ["Event", "TrunkLoop"]


@dataclass(frozen=True, slots=True)
class Event:
    """What the gateway hands over: a message of a session, or (``message`` None) the news that it is open or gone."""

    session: str
    message: Any = None
    payload: Any = None
    opened: bool = False
    name: str = ""
    replaces: str = ""  # a lost session of the same client
    lost: bool = False  # gone, and neither side has ended it
    at: float = field(default_factory=time.monotonic)  # when it came


#: More than honest clients can have under way: their credit bounds the payloads, this bounds the rest.
INBOX_EVENTS = 65536


class TrunkLoop:
    """Runs until :meth:`stop`. ``run`` hears of each closed step, in the trunk's thread, to write checkpoints, and
    ``on_presence(here, awaited, trained)`` of each change: which clients are here, which others may come again, and whether a
    step has closed, or none will.
    """

    def __init__(
        self,
        engine: Engine,
        steps: Steps | AsyncSteps,
        scheduler: Scheduler,
        outlet: Outlet,
        log: RunLog,
        *,
        client_tokens: int,
        payload_of: Callable[[Any], Any],
        meter: Meter | None = None,
        run: Run | None = None,
        rounds: RoundKeeper | None = None,
        caches: CacheBook | None = None,
        on_presence: Callable[[Set[str], Set[str], bool], None] = lambda here, awaited, trained: None,
    ) -> None:
        self._engine, self._steps, self._scheduler = engine, steps, scheduler
        self._outlet, self._log = outlet, log
        self._client_tokens = client_tokens
        meter = meter or Meter()
        self._on_presence = on_presence
        self._presence: tuple[Set[str], Set[str], bool] = (set(), set(), False)
        self.inbox: queue.Queue[Event | None] = queue.Queue(INBOX_EVENTS)
        self._names: dict[str, str] = {}
        self._keeper = StepKeeper(engine, steps, scheduler, outlet, log, meter, self._names, run or NotKept(), rounds)
        self._absent = self._keeper.absent
        if steps.number:  # taken up again, perhaps at its end, which clients may not have heard of
            self._absent.lost(ANYBODY, time.monotonic())
        self._batches = Batches(
            engine,
            steps,
            scheduler,
            self._keeper,
            outlet,
            meter,
            log,
            names=self._names,
            payload_of=payload_of,
            end=self._end,
            wake=self.wake,
            caches=caches,
        )
        self._rounds = rounds
        if rounds is not None:
            rounds.names = self._names
        self._stopping = False
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="trunk", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finish the batch under way, then end."""
        self._stopping = True
        self.wake()
        if self._thread.ident is not None:
            self._thread.join()
        self._batches.close()

    def finish_step(self, timeout: float, hurries: Callable[[], bool] = lambda: False) -> bool:
        """Open no further step, and wait for the end of the open one, unless somebody ``hurries``; True where none is open any
        more.
        """
        self._keeper.ending = True
        deadline = time.monotonic() + timeout
        while self._keeper.is_amid_step and self._thread.is_alive() and time.monotonic() < deadline and not hurries():
            self.wake()
            self._thread.join(0.02)
        return not self._keeper.is_amid_step

    @property
    def is_amid_round(self) -> bool:
        """Whether the newest step is part of nothing kept or said: the round that it ends is not over."""
        return self._keeper.is_amid_round

    @property
    def step(self) -> int:
        """The open step, or the next to open. From any thread."""
        return self._keeper.stands

    def wake(self) -> None:
        """Let the thread look around. From any thread."""
        # The inbox can be full only while the thread is busy, or has failed; neither waits for this word.
        with contextlib.suppress(queue.Full):
            self.inbox.put_nowait(None)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread; True once it has ended."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # --- the loop ---------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
            self._batches.settle()
        except BaseException as error:
            # A failure of the trunk itself ends the run; whoever started the loop looks at `failure`.
            self.failure = error
            self._log.write("failed", error=kind_and_line(error))
        self._keeper.log_uncounted()  # of a step that no longer closes

    def _turn(self) -> None:
        self._receive()
        if not self._batches.are_underway:
            self._keeper.drop_late(idle=False)  # a trunk that others keep busy must not keep a step open for ever
        self._batches.go_on()
        if not self._batches.are_underway:
            self._look_around()

    def _look_around(self) -> None:
        """Between two batches: steps are closed and opened, and whoever waits for that is told."""
        self._keeper.turn()
        if self.inbox.empty() and not self._batches.has_work and self._keeper.drop_late(idle=True):
            self._keeper.turn()
        if self._keeper.trained:
            self._absent.back(ANYBODY)  # not at its end
        # Clients of a run that was taken up again may have had no more than an evaluation to do.
        trained = self._keeper.trained or self._steps.complete or self._absent.has_returned
        presence = set(self._names.values()), self._keeper.awaited(), trained
        if presence != self._presence:
            self._presence = presence
            self._on_presence(*presence)

    def _receive(self) -> None:
        """Take in all that has come; sleep only where nothing could run."""
        block, now = not self._batches.may_go_on, time.monotonic()
        patience = self._patience(now) if block else None
        while True:
            try:
                event = self.inbox.get(block=block, timeout=patience)
            except queue.Empty:
                return
            block = False
            if event is None:
                return
            try:
                self._process(event)
            except RemoteProtocolError as error:
                self._end(event.session, "protocol", str(error))

    def _patience(self, now: float) -> float | None:
        """Seconds until something is due though nothing comes; None: nothing is."""
        dues = [due for due in (self._scheduler.due, self._batches.decoder.due) if due is not None]
        batch = max(0.0, min(dues) - now) if dues else None
        if self._batches.are_underway:
            return batch if self._batches.have_room else None  # the end of what runs wakes the thread
        return min((due for due in (self._keeper.wake(now), batch, self._absent.wake(now)) if due is not None), default=None)

    # --- process ----------------------------------------------------------------------------------------------------------------

    def _process(self, event: Event) -> None:
        session, message = event.session, event.message
        if message is None:
            if event.opened:
                if self._names.get(event.replaces) == event.name:
                    self._end(event.replaces, "replaced", "another session of this client has taken its place")
                self._names[session] = event.name
                if self._rounds is not None:
                    self._rounds.opened(session, event.replaces)
                self._absent.back(event.name)
                self._batches.settle()
                try:
                    self._engine.training.joined(event.name)
                except CheckpointError as error:
                    self._log.write("adapter-unreadable", client=event.name, error=str(error))
                    self._end(session, "adapter", "your adapter cannot be read: ask the operator to look at the log")
            else:
                self._forget(session, lost=event.lost)
            return
        if session not in self._names:
            return  # ended meanwhile; what was still on its way is dropped
        if isinstance(message, Forward):
            self._take_forward(event, message)
        elif isinstance(message, Backward):
            # The rows' graph is already paid for, so the credit goes back on arrival: two micro-batches that share a trunk batch
            # can then never wait for each other's credit.
            if message.targets > message.rows:
                raise RemoteProtocolError(f"{message.targets} targets in a micro-batch of {message.rows} tokens")
            self._take_backward(event, message)
            self._outlet.credit(session, message.payload_bytes)
        elif isinstance(message, Release):
            self._batches.decoder.release(session, message.sequences)
        elif isinstance(message, EndsPart):
            assert self._rounds is not None, "the gateway takes only parts that were asked for"
            self._rounds.take_part(session, message, event.payload)
        elif isinstance(message, Enrol):
            self._keeper.enrol(session, message)
        elif isinstance(message, StepDone | AskNorm):
            self._keeper.done(session, message)
        elif isinstance(message, Pause | Leave):
            self._batches.settle()
            if session in self._names:  # what has run may have ended it
                self._keeper.withdraw(session)

    def _take_forward(self, event: Event, forward: Forward) -> None:
        session = event.session
        if forward.sequences:  # runs in chunks, within the room for caches
            self._batches.decoder.take(session, self._names[session], forward, event.payload, event.at)
            return
        padded = len(forward.segments) * max(length for length, _ in forward.segments)
        if padded > self._client_tokens:
            text = (
                f"a micro-batch whose {len(forward.segments)} sequences take {padded} tokens with their padding, where the trunk "
                f"takes {self._client_tokens}; use a smaller batch, or sequences of like length"
            )
            self._end(session, "too-many-tokens", text)
            return
        if forward.grad and self._steps.is_stale(session, forward.step):
            self._keeper.take_stale(session, forward.micro)
            self._outlet.credit(session, forward.payload_bytes)
            return
        if forward.grad:
            self._steps.take_forward(session, forward.step)
            if self._scheduler.kept_tokens(session) + forward.rows > self._client_tokens:
                text = (
                    f"more than {self._client_tokens} tokens of this client would wait in the trunk at once; "
                    "use a smaller batch, or ask the operator to raise client_tokens"
                )
                self._end(session, "too-many-tokens", text)
                return
        self._scheduler.add_forward(
            session,
            forward,
            event.payload,
            client=self._names[session],
            ordinal=forward.ordinal,
            replayed=forward.grad and self._steps.is_replay(session, forward.step, forward.ordinal),
            now=event.at,
        )

    def _take_backward(self, event: Event, backward: Backward) -> None:
        session = event.session
        if self._steps.is_stale(session, backward.step):
            self._keeper.take_stale(session, backward.micro)
            return
        member = self._scheduler.add_backward(session, backward, event.payload, now=event.at)
        self._steps.backward_arrived(session, backward.step, member.ordinal)
        self._keeper.abandon_if_all_arrived(session)

    def _end(self, session: str, code: str, text: str) -> None:
        self._batches.settle()
        self._outlet.end(session, Fault(code, text, True, None))
        self._forget(session)

    def _forget(self, session: str, *, lost: bool = False) -> None:
        self._batches.settle()  # what has begun of it counts
        client = self._names.pop(session, None)
        if client is None:
            return
        self._scheduler.forget(session)
        self._batches.decoder.forget(session)
        self._keeper.forget(session, client)
        if lost and client not in self._names.values():
            self._absent.lost(client, time.monotonic())
