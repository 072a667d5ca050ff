"""Where a client stands in the run's steps: whether it takes part, what it has sent, whether the run waited for it.

The channel's I/O thread tells what it hears; the training thread waits. ``session.py`` adds the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from client_ends.journal import Journal
from client_ends.linked import Linked
from client_ends.micro import Micro, anew, missed
from client_ends.rounds import EndsRounds
from splitfl.errors import (
    LocalProtocolError,
    RemoteProtocolError,
    RunComplete,
    RunWentBack,
    SessionLost,
    SplitflError,
    UserError,
)
from splitfl.protocol.control import MAX_HELD
from splitfl.protocol.messages import (
    Enrol,
    Fault,
    Leave,
    Pause,
    RoundClosed,
    RoundOpened,
    StepClosed,
    StepDone,
    StepOpened,
)

__all__ = ["Participant"]

#: The word that a step has closed changes the channel's state a moment before it is heard here, seconds.
_HEARD_SOON = 5.0


class Participant(Linked):
    """A client in the run's steps."""

    def __init__(self) -> None:
        super().__init__()
        self._journal: Journal | None = None  # kept where a part may be sent again
        self._away: SplitflError | None = None  # what befell the step under way while the link was down, not raised yet
        self._fate: SplitflError | None = None  # the newest of these
        self._enrolling = False
        self._held: Callable[[], Sequence[int]] = tuple
        self._on_due: Callable[[int], None] = lambda step: None
        self._micros: dict[int, Micro] = {}
        self._next_micro = 0
        self._enrolled = False
        self._opened: int | None = None
        self._forwards = self._backwards = self._targets = 0  # sent of the present step
        self._unanswered: set[int] = set()  # forwards with a graph
        self._closed: StepClosed | None = None
        self._dropped: StepClosed | None = None  # the word that a step went on without this client
        self._complete = False
        self.rounds: EndsRounds | None = None  # where the run averages the ends
        self.step = -1

    # --- checkpoints ------------------------------------------------------------------------------------------------------------

    def keep_with(self, on_due: Callable[[int], None], held: Callable[[], Sequence[int]] = tuple) -> None:
        """``on_due(step)`` is called when the ends are to be kept as they are after ``step``, before the server is told that this
        client's part of it is done; ``held()``: the steps that have been kept so.
        """
        self._on_due, self._held = on_due, held

    def _enrolment(self) -> Enrol:
        """Says after which steps this client can go on."""
        last = self._journal.last if self._journal is not None else None
        able = {self.step - 1} if last is None else {last.step, last.step - 1}
        steps = sorted({*able, *self._held()}, reverse=True)
        return Enrol(tuple(step for step in steps if step >= 0)[:MAX_HELD], moves=self._journal is not None)

    # --- steps ------------------------------------------------------------------------------------------------------------------

    def _declaration(self) -> list[Any]:
        """What is to be said before this session first enrols."""
        declared = self.rounds.declare() if self.rounds is not None else None
        return [] if declared is None else list(declared.messages())

    def enrol(self) -> int:
        """Take part in the next step to open, and wait for it; returns its number.

        Raises:
            RunComplete: no step will open any more.
            RunWentBack: it is older than this client stands. It takes part in that step all the same.
        """
        self._take_part()
        return self.step

    def _take_part(self) -> None:
        """Enrol where that has not happened, and wait for the step to open."""
        with self._lock:
            self._await_link()
        if self._enrolled:
            return
        complete = f"the run has made its {self.terms['optimizer']['steps']} steps; start a new run to train on"
        if self._complete or (self._last_step and self.step >= self._last_step):
            raise RunComplete(complete)
        with self.waits, self._lock:
            # A forward of a step that went on without this client must not be taken for one of the step to come.
            self._lock.wait_for(lambda: not self._unanswered or self._lost is not None)
            self._await_link()
            self._opened, self._enrolling = None, True
            for message in self._declaration():
                self._tell(message)
            self._tell(self._enrolment())
            self._lock.wait_for(lambda: self._opened is not None or self._lost is not None or self._complete)
            self._enrolling = False
            self._check()
            if self._opened is None:
                raise RunComplete(complete)
            stood, self.step, self._enrolled = self.step, self._opened, True
            if self.rounds is not None:
                self.rounds.excuse()  # of what is over this session has heard by now, and the run may have gone back behind it
            if self._opened < stood and self._has_barrier:
                raise RunWentBack(self._opened)

    def _begin_in_step(self) -> None:
        """Take part in a step in which the next forward can leave now. The lock is held."""
        self._check_missed()
        while True:
            self._take_part()
            self._await_link()
            self._check_missed()
            # Else the word that the step was over came while this waited, before anything of its part had been sent.
            if self._enrolled:
                return

    def _await_opened(self, step: int) -> None:
        """Wait until this client has heard that ``step`` is open: a data message may overtake that word. Raises StepMissed."""

        def heard() -> bool:
            return (self._opened is not None and self._opened >= step) or self._is_broken_off()

        with self.waits, self._lock:
            self._lock.wait_for(heard)
            self._check()
        self._check_missed()

    def await_leftovers(self) -> None:
        """Wait for the answers to forwards of a call that failed before it had them all. Where they ran together with the next
        call's, the trunk would wait for their gradients, which never come, before it answers that one's.
        """
        with self.waits, self._lock:
            self._lock.wait_for(lambda: not self._unanswered or self._is_broken_off())

    def begin_forward(self) -> None:
        """Where the run averages the ends: take part, and have the newest average in them, before a training forward uses them.

        Raises:
            StepMissed, RunComplete, SessionLost; ConfigError: the ends cannot be averaged with the others.
        """
        if self.rounds is not None:
            self._check()
            self.settle_round()
            self._check_missed()
            self._take_part()
            self.settle_round()

    def settle_round(self) -> None:
        """Wait for the end of a round that this client's newest step has ended, and put the average into the ends. Does nothing
        where the ends are this client's own, or amid a round.
        """
        rounds = self.rounds
        if rounds is None:
            return
        with self.waits, self._lock:
            self._lock.wait_for(lambda: rounds.is_over or self._lost is not None or self._dropped is not None)
            if not rounds.is_over:
                self._check()
                rounds.excuse()
            self._lock.wait_for(lambda: rounds.is_settled or self._lost is not None)
            if not rounds.is_settled:
                self._check()
            # Under the lock: another session that begins meanwhile forgets what came in this one.
            rounds.load()

    # --- a step that went on without this client --------------------------------------------------------------------------------

    def _is_broken_off(self) -> bool:
        """Whether nothing comes any more of the step under way, or of the session. The lock is held."""
        return self._lost is not None or self._dropped is not None or self._away is not None

    def _check_missed(self) -> None:
        """Raises StepMissed, once, where a step went on without this client that it had begun to take part in; RunWentBack, once,
        where the run stands before a step that this client has made.
        """
        with self._lock:
            away, self._away = self._away, None
            if away is not None:
                raise anew(away)
            dropped, begun = self._dropped, self._forwards > 0
            if dropped is None:
                return
            self._give_up()
        if begun:
            raise missed(dropped.step)

    def _give_up(self) -> None:
        """Out of steps; the next training forward enrols again."""
        with self._lock:
            self._dropped = None
            self._enrolled = False
            if self.rounds is not None:
                self.rounds.excuse()
            self._clear_step()

    def _hears_of_drop(self) -> bool:
        """Whether the word that a step went on without this client is what made the channel refuse a message."""
        with self._lock:
            self._lock.wait_for(lambda: self._dropped is not None or self._lost is not None, timeout=_HEARD_SOON)
            self._check()
            return self._dropped is not None

    # --- the end of a part ------------------------------------------------------------------------------------------------------

    def step_done(self, then: str = "continue", ends_norm: float | None = None) -> None:
        """This client's part of the step is done. ``then``: ``continue``, ``pause`` or ``leave``. ``ends_norm``: of the ends'
        gradient, where the run clips both sides together.

        Returns at once; a forward of the next step waits at the server until the step has closed.

        Raises:
            StepMissed: the step went on without this client, and not all that it sent has counted.
            RunWentBack: the run stands before this step.
        """
        self._check()
        if self._enrolled and self.is_due(self.step):
            self._on_due(self.step)
        if self._dropped is not None:
            self._done_too_late()
            return
        if not self._enrolled:
            raise LocalProtocolError("a step ends that this client takes no part in")
        if self._last_step and self.step + 1 >= self._last_step and then == "continue":
            then = "leave"
        self._await_opened(self.step)
        with self._lock:
            self._await_link()
            if self._away is None and self._dropped is None:
                message = StepDone(self.step, self._forwards, self._backwards, then, ends_norm)
                try:
                    self._tell(message)
                except LocalProtocolError:
                    if not self._hears_of_drop():
                        raise
                else:
                    if self._journal is not None:
                        self._journal.done(message)
        if self._dropped is not None:
            self._done_too_late()
            return
        self._check_missed()
        self._clear_step()
        if self.rounds is not None:
            self.rounds.step_ended(self.step)
        self.step += 1
        self._enrolled = then == "continue"

    def _done_too_late(self) -> None:
        """The step did not wait for the word that this part is done; where all of it had counted by then, nothing is missed."""
        with self._lock:
            dropped = self._dropped
            assert dropped is not None
            whole = dropped.step == self.step and dropped.counted == self._targets
            if not whole:
                self._check_missed()
            self._give_up()
            self.step = max(self.step, dropped.step + 1)

    def _clear_step(self) -> None:
        """Nothing of the step under way counts any more."""
        with self._lock:
            # Forwards whose loss was thrown away, and answers nobody awaits because the input end is frozen.
            for number in [number for number, micro in self._micros.items() if micro.step <= self.step]:
                del self._micros[number]
            if self._journal is not None:
                self._journal.drop_present()
        self._forwards = self._backwards = self._targets = 0

    @property
    def may_end_before_ends(self) -> bool:
        """Whether the server may be told of the end of this part before the ends' optimizer has stepped: unless the ends are kept
        as they are after it, averaged, or clipped together with the trunk.
        """
        return self.rounds is None and not self.is_due(self.step) and self.terms["optimizer"]["clipping"] == "separate"

    @property
    def contributed(self) -> bool:
        """Whether a backward went out since the last step ended."""
        return self._backwards > 0

    @property
    def has_stepped(self) -> bool:
        """Whether this client stands behind a step that it has seen the trunk make."""
        return self._closed is not None and self._closed.step < self.step

    def wait_closed(self, step: int) -> StepClosed:
        """Wait until ``step`` has closed; returns the newest closed step's report, of zeros where it closed unheard, while the
        link was down.

        Raises:
            RunWentBack: it has to be made again.
        """

        def heard() -> bool:
            return (self._closed is not None and self._closed.step >= step) or self._away is not None

        with self.waits, self._lock:
            self._lock.wait_for(lambda: heard() or self._lost is not None)
            if self._away is not None:
                self._check_missed()
            if self._closed is None or self._closed.step < step:
                self._check()
            assert self._closed is not None
            return self._closed

    def pause(self) -> None:
        """Withdraw from the next step; the next training forward enrols again. Raises UserError amid a step."""
        self._settle("pause")
        self._withdraw(Pause())

    def leave(self) -> None:
        """Take no part in further steps; evaluation goes on working. Raises UserError amid a step."""
        self._settle("leave")
        self._withdraw(Leave())

    def _withdraw(self, message: Pause | Leave) -> None:
        with self._lock:
            if not self._enrolled:
                return
            self._await_link()
            if self._enrolled:
                self._tell(message)
                self._clear_step()
                self._enrolled = False

    def _settle(self, what: str) -> None:
        if self._dropped is not None:
            self._give_up()  # out of steps already
        if self._backwards:
            raise UserError(f"a step is under way: let the optimizer step, or call model.step(), before you {what}")

    # --- the I/O thread's side --------------------------------------------------------------------------------------------------

    def _on_control(self, message: Any) -> None:
        if isinstance(message, RoundOpened | RoundClosed):
            self._on_round(message)
            return
        with self._lock:
            if isinstance(message, StepOpened):
                self._opened, self._dropped = message.step, None
                if self._journal is not None:
                    self._journal.closed(message.step - 1)
            elif isinstance(message, StepClosed):
                self._closed = message
                if self._journal is not None:
                    self._journal.closed(message.step)
                if message.dropped:
                    self._dropped = message
                    for micro in self._micros.values():
                        if micro.grad and micro.step >= message.step:
                            micro.fail(missed(message.step))
            elif isinstance(message, Fault) and message.micro is not None:
                self._unanswered.discard(message.micro)
                asked = self._micros.get(message.micro)
                if asked is not None:
                    asked.fail(asked.fate(message))
            elif isinstance(message, Fault) and message.code == "run-complete":
                self._complete = True  # no more steps; evaluation goes on
            elif isinstance(message, Fault):
                self._lost = self._lost or SessionLost(message.text, message.code)
            self._lock.notify_all()

    def _on_round(self, message: RoundOpened | RoundClosed) -> None:
        if self.rounds is None:
            raise RemoteProtocolError("the server averages ends in a run where they are each client's own")
        self.rounds.hear(message, self.channel.send)
        with self._lock:
            self._lock.notify_all()
