"""Steps as clients see them: opened and closed in order, the late gone on without, the ledger in the log.

:mod:`server_trunk.steps` knows what may happen; this does it, and tells those it concerns. Called from the trunk's thread.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from server_trunk.absent import Absent
from server_trunk.async_steps import AsyncSteps
from server_trunk.engine import Engine
from server_trunk.ledger import PAUSED, Ledger, Part
from server_trunk.members import NO_TARGETS, NOT_FINITE, Member
from server_trunk.meter import Meter
from server_trunk.outlet import Outlet
from server_trunk.roundkeeper import RoundKeeper
from server_trunk.scheduler import MAX_UNDERWAY, Scheduler
from server_trunk.steps import Steps
from server_trunk.training import SharedTraining, StepReport
from splitfl.errors import CheckpointError, RemoteProtocolError
from splitfl.protocol.messages import AskNorm, Backward, Enrol, Fault, RefusalCode, StepClosed, StepDone, StepOpened, TrunkNorm
from splitfl.runlog import RunLog

__all__ = ["NotKept", "Run", "StepKeeper"]

_COMPLETE = Fault("run-complete", "the run has made all its steps; start a new run to train on", False, None)
_STALE = "the step this belongs to has gone on without it"
_UNCOUNTED = {
    NOT_FINITE: "its hidden states or its gradient are not finite, or absurdly large, so it counts for nothing in this step",
    NO_TARGETS: "it has a gradient and no target token, so it counts for nothing in this step: say the targets by objective()",
}


class Run(Protocol):
    """What is kept of a run. Called from the trunk's thread."""

    def made(self, ledger: Ledger) -> bool:
        """A step was made; returns whether the run is kept as it is after it."""

    def kept(self) -> Sequence[int]:
        """The steps after which the run could be taken up again."""

    def go_back(self, step: int) -> None:
        """Take the run up again after ``step``. Raises CheckpointError where that is damaged; then it is kept no more."""


class NotKept:
    """A run of which nothing is kept."""

    def made(self, ledger: Ledger) -> bool:
        return False

    def kept(self) -> Sequence[int]:
        return ()

    def go_back(self, step: int) -> None:
        raise AssertionError("nothing is kept")


class StepKeeper:
    """``names``: clients by open session, kept by the loop. ``run`` is what is kept of the run. ``rounds``: where the run
    averages the clients' ends.
    """

    def __init__(
        self,
        engine: Engine,
        steps: Steps | AsyncSteps,
        scheduler: Scheduler,
        outlet: Outlet,
        log: RunLog,
        meter: Meter,
        names: Mapping[str, str],
        run: Run,
        rounds: RoundKeeper | None = None,
    ) -> None:
        self._engine, self._steps, self._scheduler = engine, steps, scheduler
        self._outlet, self._log, self._meter, self._names, self._run = outlet, log, meter, names, run
        self.absent = Absent()
        self._rounds = rounds
        self._unsaid: tuple[Ledger, StepReport] | None = None  # a step whose round is not over
        self._enrolments: dict[str, int] = {}
        self._too_late: list[str] = []  # sessions that enrolled after the last step, to be told so once that is said
        self._uncounted: Counter[tuple[str, int, str]] = Counter()  # by client, step and reason: what the log has yet to say
        self._stale: dict[str, list[int]] = {}  # micro-batches by session, to be told so once their step has closed
        self._report = StepReport(0.0, None)  # of the newest step
        self._began = time.monotonic()
        self._busy = 0.0
        self._tokens = 0
        self.trained = False  # whether a step has closed
        self.ending = False  # no further step opens
        self.stands = steps.number  # the open step, or the next to open

    # --- what clients say -------------------------------------------------------------------------------------------------------

    def enrol(self, session: str, message: Enrol) -> None:
        if self._steps.complete:
            self._too_late.append(session)
            if self._unsaid is None:
                self._dismiss()
            return
        self._steps.enrol(session, self._names[session], message.held, moves=message.moves)
        if self._rounds is not None and session not in self._enrolments:
            self._rounds.joins(session, message.held)
        self._enrolments[session] = self._enrolments.get(session, 0) + 1

    def done(self, session: str, message: StepDone | AskNorm) -> None:
        """A session has sent all of its part, or, in a run that clips both sides together, all gradients of it."""
        if isinstance(message, StepDone):
            self._steps.done(session, message)
        else:
            assert isinstance(self._steps, Steps), "the gateway takes it only there"
            self._steps.ask_norm(session, message)
        self.abandon_if_all_arrived(session)

    def withdraw(self, session: str) -> None:
        """Pause or Leave."""
        if self._scheduler.waits(session):
            raise RemoteProtocolError("left the step while forwards of it are under way")
        if self._rounds is not None:
            self._rounds.withdraw(session)
        left = self._steps.pause(session, self._names[session])
        if left is not None:
            self._scheduler.abandon(session, left)

    def forget(self, session: str, client: str) -> None:
        """The session of ``client`` is gone."""
        self.log_uncounted(client)
        self._enrolments.pop(session, None)
        self._stale.pop(session, None)
        self._too_late = [other for other in self._too_late if other != session]
        now = time.monotonic()
        waited_for = self._steps.away(now)
        self._steps.lose(session, now)
        if client in self._steps.away(now) - waited_for:
            self._log.write("held", client=client, step=self._steps.number)
        if self._rounds is not None:
            self._rounds.forget(session)

    def awaited(self) -> set[str]:
        """Clients that are not here, and for whose return a step waits, or the end of the run."""
        now = time.monotonic()
        return (self._steps.away(now) | self.absent.clients(now)).difference(self._names.values())

    @property
    def is_amid_step(self) -> bool:
        """Whether a step is open, or made and not said."""
        return self._steps.is_open or self._unsaid is not None

    @property
    def is_amid_round(self) -> bool:
        """Whether a step is made and the round that it ends is not over."""
        return self._unsaid is not None

    def wake(self, now: float) -> float | None:
        """Seconds until :meth:`turn` is worth calling again though nothing has happened; None: no need."""
        return self._rounds.wake(now) if self._rounds is not None and self._rounds.is_open else self._steps.wake(now)

    def take_stale(self, session: str, micro: int) -> None:
        """A micro-batch of a step that did not wait for it. Credit does not bound these: it is given back before they are
        answered.
        """
        late = self._stale.setdefault(session, [])
        if len(late) > 2 * MAX_UNDERWAY:  # forwards and backwards
            raise RemoteProtocolError("more micro-batches of a step that has gone on than a session can have under way")
        late.append(micro)

    def abandon_if_all_arrived(self, session: str) -> None:
        """Once all announced backwards are here, the other forwards of the step will never get one."""
        step = self._steps.all_arrived(session)
        if step is not None:
            self._scheduler.abandon(session, step)

    # --- what the trunk does ----------------------------------------------------------------------------------------------------

    def ran(self, *, seconds: float = 0.0, tokens: int = 0) -> None:
        """The engine was at work for so long, or ran so many tokens forwards."""
        self._busy += seconds
        self._tokens += tokens

    def tell_uncounted(self, member: Member, back: Backward) -> None:
        """A gradient has counted as zero: in the live numbers, to whom it came from, and, once for all of a step, in the log."""
        self._uncounted[member.client, back.step, member.spoilt] += 1
        self._meter.uncounted(member.client)
        self._outlet.tell(member.session, Fault(RefusalCode.NOT_COUNTED, _UNCOUNTED[member.spoilt], False, back.micro))

    def log_uncounted(self, client: str | None = None) -> None:
        """A line for all that a client (or, None, anybody) has sent of the kind in a step, as no client is to fill the log."""
        for key in [key for key in self._uncounted if client in (None, key[0])]:
            (name, step, why), count = key, self._uncounted.pop(key)
            if why == NO_TARGETS:
                self._log.write("gradient-no-targets", client=name, step=step, micro_batches=count)
            else:
                self._log.write("gradient-not-finite", client=name, step=step, micro_batches=count)

    def drop_late(self, *, idle: bool) -> bool:
        """Go on without those whom others have waited for too long; returns whether there are any. ``idle``: nothing can run."""
        late = self._steps.overdue(time.monotonic(), idle=idle)
        for session in late:
            step = self._steps.drop(session)
            self._log.write("late", client=self._names.get(session), session=session[:8], step=step)
            self._abandon_stale(session)
            self._scheduler.abandon(session, step)
        return bool(late)

    def _abandon_stale(self, session: str) -> None:
        """What waits of a part that nobody waits for any more does not run."""
        gone = self._scheduler.withdraw(session, lambda one: one.forward.grad and self._steps.is_stale(session, one.forward.step))
        for member in gone:
            self._outlet.credit(session, member.forward.payload_bytes)
            self._stale.setdefault(session, []).append(member.forward.micro)

    def turn(self) -> None:
        """Close the step that is whole, open the next, and tell whom it concerns."""
        self._tell_norm()
        if not self._finish():
            if self._rounds is not None and self._rounds.is_void:
                self._steps.close()  # hears that the run ends
            return
        for part in self._steps.ended():
            self.log_uncounted(part.client)
            self._tell_closed(part, part.step, part.targets, 1)
        ledger = self._steps.close()
        if ledger is not None:
            self._close(ledger)
            if not self._finish():
                return
        if self.ending and not (self._steps.is_open and isinstance(self._steps, Steps)):
            self._answer_stale()
            return
        self._depart()
        self._go_back()
        was_open, now = self._steps.is_open, time.monotonic()
        for session, step in self._steps.openings(now):
            if not was_open:
                self._began = now
            if self._rounds is not None:
                self._rounds.bring_up(session)
            # Says which Enrol it answers: a Pause and an Enrol may wait in the inbox, and the channel drops what they overtook.
            self._outlet.tell(session, StepOpened(step, self._enrolments[session]))
        self._answer_stale()

    def _depart(self) -> None:
        """End the sessions of clients that go to another replica."""
        for session in self._steps.departures():
            client = self._names[session]
            self._log.write("moved", client=client, session=session[:8], after=self._steps.number - 1)
            self._outlet.end(session, Fault(RefusalCode.MOVED, "this client goes to another replica", True, None))
            self.absent.lost(client, time.monotonic())  # until it is seen there
            if self._rounds is not None:
                self._rounds.departs(session)

    def _tell_norm(self) -> None:
        """Answer whoever waits for the norm of the step's gradient before it clips its own."""
        if not isinstance(self._steps, Steps):
            return
        for part in self._steps.norm_due():
            training = self._engine.training
            norm = training.norm(self._steps.targets) if isinstance(training, SharedTraining) else None
            self._outlet.tell(part.session, TrunkNorm(part.step, norm))

    def _go_back(self) -> None:
        """A run that was resumed begins where all who are there can begin, if there is such a step."""
        while (common := self._steps.common(self._run.kept())) is not None:
            try:
                self._run.go_back(common)
            except CheckpointError:
                if common in self._run.kept():
                    raise
                continue  # it was damaged: the one before it
            self._steps.go_back(common + 1)
            self.stands = common + 1
            return

    def _answer_stale(self) -> None:
        """Tell clients which of their micro-batches nobody waits for, after they were told of the end of the step."""
        for session in [session for session in self._stale if not self._steps.is_ending(session)]:
            for micro in self._stale.pop(session):
                self._outlet.tell(session, Fault("stale", _STALE, False, micro))

    def _tell_closed(
        self, part: Part, step: int, targets: int, participants: int, grad_norm: float | None = None, *, kept: bool = False
    ) -> None:
        rate, given = self._report.of(part.client).learning_rate, part.targets
        closed = StepClosed(step, targets, participants, rate, grad_norm, given, part.withdrawn, part.staleness, kept)
        self._outlet.tell(part.session, closed)

    def _named(self, ledger: Ledger) -> dict[str, dict[str, Any]]:
        """What each participant gave to a step, by the client's name (and the session, where a client has several)."""
        named: dict[str, dict[str, Any]] = {}
        for session, part in ledger.parts.items():
            key = f"{part.client}/{session[:4]}" if part.client in named else part.client
            named[key] = {"targets": part.targets, "micro_batches": part.micro_batches, "dropped": part.dropped}
            if part.why:
                named[key]["why"] = part.why
            if not ledger.ends_parts:
                named[key]["staleness"] = part.staleness
            if part.client in self._report.clients:
                own = self._report.of(part.client)
                named[key] |= {"learning_rate": own.learning_rate, "grad_norm": own.grad_norm}
        return named

    def _close(self, ledger: Ledger) -> None:
        began = time.monotonic()
        norms = [part.done.ends_norm for part in ledger.parts.values() if part.done is not None and part.done.ends_norm]
        if norms and isinstance(self._engine.training, SharedTraining):
            self._engine.training.clip_with(math.hypot(*norms))
        report = self._engine.close_step(ledger.step, ledger.targets_by_client)
        self.trained = True
        self._report = report
        now = time.monotonic()
        self._busy += now - began
        self._meter.step_closed(
            ((part.client, part.targets, part.dropped) for part in ledger.parts.values()), seconds=now - began
        )
        seconds = now - self._began
        self._log.write(
            "step",
            step=ledger.step,
            targets=ledger.targets,
            targets_here=ledger.targets_here if ledger.participants_elsewhere else None,
            met=sum(ledger.met.values()) if ledger.met is not None else None,
            learning_rate=report.learning_rate,
            grad_norm=report.grad_norm,
            skipped=report.skipped or None,
            tokens=self._tokens,
            seconds=round(seconds, 4),
            tokens_per_second=round(self._tokens / seconds, 1) if seconds > 0 else None,
            busy=round(min(1.0, self._busy / seconds), 3) if seconds > 0 else None,
            parts=self._named(ledger),
        )
        self.log_uncounted()
        for part in ledger.parts.values():
            if part.dropped and part.why != PAUSED:
                self._log.write("dropped", client=part.client, step=ledger.step, why=part.why, targets=part.targets)
        self._began, self._busy, self._tokens = now, 0.0, 0
        self._unsaid = ledger, report
        if self._rounds is not None:
            self._rounds.step_closed(ledger)

    def _finish(self) -> bool:
        """Say what is unsaid, once the round that it ends is over; False while that goes on."""
        if self._rounds is not None:
            if isinstance(self._steps, Steps) and self._steps.stops_now:
                self._rounds.give_up()
            self._rounds.turn()
            if self._rounds.is_open:
                return False
        if self._unsaid is not None:
            self._say(*self._unsaid)
        return True

    def _say(self, ledger: Ledger, report: StepReport) -> None:
        """A step is over, and so is the round that it ended, if it did."""
        # First kept, then said: a run that starts again never stands before a checkpoint that its clients have heard of.
        kept = self._run.made(ledger)
        self._unsaid = None
        self.stands = self._steps.number
        if ledger.ends_parts:
            for part in ledger.parts.values():
                norm = report.of(part.client).grad_norm
                self._tell_closed(part, ledger.step, ledger.targets, ledger.participants, norm, kept=kept)
        self._depart()
        if self._rounds is not None:
            self._rounds.tell()
        self._too_late += self._steps.dismiss()
        self._dismiss()

    def _dismiss(self) -> None:
        """No step will open any more for those who wait for one; what they have missed is the newest average."""
        late, self._too_late = self._too_late, []
        for session in late:
            self._abandon_stale(session)
            if self._rounds is not None:
                self._rounds.bring_up(session)
            self._outlet.tell(session, _COMPLETE)
