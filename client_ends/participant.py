"""Where a client stands in the run's steps: whether it takes part, what it has sent, whether the run waited for it.

The channel's I/O thread tells what it hears; the training thread waits. ``session.py`` adds the tensors.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from client_ends.rounds import EndsRounds
from splitfl.channel.client import ClientChannel
from splitfl.errors import LocalProtocolError, RemoteProtocolError, RunComplete, SessionLost, SplitflError, StepMissed, UserError
from splitfl.protocol.messages import Enrol, Fault, Leave, Pause, RoundClosed, RoundOpened, StepClosed, StepDone, StepOpened

__all__ = ["Micro", "Participant"]

#: The word that a step has closed changes the channel's state a moment before it is heard here, seconds.
_HEARD_SOON = 5.0


@dataclass(slots=True)
class Micro:
    """One micro-batch under way: ``rows`` tokens went out, as many come back, twice."""

    step: int
    rows: int
    hidden: int
    dtype: str
    train: bool
    y: Future[torch.Tensor] = field(default_factory=Future)
    dh: Future[torch.Tensor] = field(default_factory=Future)

    def fail(self, error: SplitflError) -> None:
        """What has not been answered never will be."""
        for future in (self.y, self.dh):
            if not future.done():
                future.set_exception(error)


def _missed(step: int) -> StepMissed:
    return StepMissed(f"step {step} went on without this client, which was late: go on with the next batch")


class Participant:
    """A client in the run's steps. After the loss of the link every call raises."""

    def __init__(self) -> None:
        self._channel: ClientChannel | None = None
        self._micros: dict[int, Micro] = {}
        self._next_micro = 0
        self._lock = threading.Condition()
        self._lost: SplitflError | None = None
        self._enrolled = False
        self._opened: int | None = None
        self._forwards = self._backwards = self._targets = 0  # sent of the present step
        self._unanswered: set[int] = set()  # forwards with a graph
        self._closed: StepClosed | None = None
        self._dropped: StepClosed | None = None  # the word that a step went on without this client
        self._complete = False
        self.rounds: EndsRounds | None = None  # where the run averages the ends
        self.step = -1

    @property
    def channel(self) -> ClientChannel:
        assert self._channel is not None
        return self._channel

    @property
    def terms(self) -> dict[str, Any]:
        """The run's terms, as the operator set them."""
        return dict(self.channel.welcome.config)

    # --- steps ------------------------------------------------------------------------------------------------------------------

    def _take_part(self) -> None:
        """Enrol where that has not happened, and wait for the step to open."""
        if self._enrolled:
            return
        complete = f"the run has made its {self.terms['optimizer']['steps']} steps; start a new run to train on"
        if self._complete or (self._last_step and self.step >= self._last_step):
            raise RunComplete(complete)
        with self._lock:
            # A forward of a step that went on without this client must not be taken for one of the step to come.
            self._lock.wait_for(lambda: not self._unanswered or self._lost is not None)
            self._check()
            self._opened = None
        declared = self.rounds.declare() if self.rounds is not None else None
        for message in declared.messages() if declared is not None else ():
            self.channel.tell(message)
        self.channel.tell(Enrol())
        with self._lock:
            self._lock.wait_for(lambda: self._opened is not None or self._lost is not None or self._complete)
            self._check()
            if self._opened is None:
                raise RunComplete(complete)
            assert self._opened is not None
            self.step, self._enrolled = self._opened, True

    def _await_opened(self, step: int) -> None:
        """Wait until this client has heard that ``step`` is open: a data message may overtake that word. Raises StepMissed."""

        def heard() -> bool:
            opened = self._opened is not None and self._opened >= step
            return opened or self._lost is not None or self._dropped is not None

        with self._lock:
            self._lock.wait_for(heard)
            self._check()
        self._check_missed()

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
        with self._lock:
            self._lock.wait_for(lambda: rounds.is_over or self._lost is not None or self._dropped is not None)
            if not rounds.is_over:
                self._check()
                rounds.excuse()
            self._lock.wait_for(lambda: rounds.is_settled or self._lost is not None)
            if not rounds.is_settled:
                self._check()
        rounds.load()

    # --- a step that went on without this client --------------------------------------------------------------------------------

    def _check_missed(self) -> None:
        """Raises StepMissed, once, where a step went on without this client that it had begun to take part in."""
        with self._lock:
            dropped, begun = self._dropped, self._forwards > 0
            if dropped is None:
                return
            self._give_up()
        if begun:
            raise _missed(dropped.step)

    def _give_up(self) -> None:
        """Out of steps; the next training forward enrols again."""
        with self._lock:
            self._dropped = None
            self._enrolled = False
            self._clear_step()

    def _hears_of_drop(self) -> bool:
        """Whether the word that a step went on without this client is what made the channel refuse a message."""
        with self._lock:
            self._lock.wait_for(lambda: self._dropped is not None or self._lost is not None, timeout=_HEARD_SOON)
            self._check()
            return self._dropped is not None

    # --- the end of a part ------------------------------------------------------------------------------------------------------

    @property
    def _last_step(self) -> int:
        """How many steps a participant of the whole run takes part in; 0: nobody knows, or there is no end."""
        total: int = self.terms["optimizer"]["steps"]
        return total if self.terms["mode"] != "async" else 0

    @property
    def complete(self) -> bool:
        """Whether the server has said that the run has made all its steps."""
        return self._complete

    def step_done(self, then: str = "continue") -> None:
        """This client's part of the step is done. ``then``: ``continue``, ``pause`` or ``leave``.

        Returns at once; a forward of the next step waits at the server until the step has closed.

        Raises:
            StepMissed: the step went on without this client, and not all that it sent has counted.
        """
        self._check()
        if self._dropped is not None:
            self._done_too_late()
            return
        if not self._enrolled:
            raise LocalProtocolError("a step ends that this client takes no part in")
        if self._last_step and self.step + 1 >= self._last_step and then == "continue":
            then = "leave"
        self._await_opened(self.step)
        try:
            self.channel.tell(StepDone(self.step, self._forwards, self._backwards, then))
        except LocalProtocolError:
            if not self._hears_of_drop():
                raise
            self._done_too_late()
            return
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
        self._forwards = self._backwards = self._targets = 0

    @property
    def contributed(self) -> bool:
        """Whether a backward went out since the last step ended."""
        return self._backwards > 0

    def wait_closed(self, step: int) -> StepClosed:
        """Wait until ``step`` has closed; returns the newest closed step's report."""
        with self._lock:
            self._lock.wait_for(lambda: (self._closed is not None and self._closed.step >= step) or self._lost is not None)
            if self._closed is None or self._closed.step < step:
                self._check()
            assert self._closed is not None
            return self._closed

    def pause(self) -> None:
        """Withdraw from the next step; the next training forward enrols again. Raises UserError amid a step."""
        self._settle("pause")
        if self._enrolled:
            self.channel.tell(Pause())
            self._clear_step()
            self._enrolled = False

    def leave(self) -> None:
        """Take no part in further steps; evaluation goes on working. Raises UserError amid a step."""
        self._settle("leave")
        if self._enrolled:
            self.channel.tell(Leave())
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
            elif isinstance(message, StepClosed):
                self._closed = message
                if message.dropped:
                    self._dropped = message
                    for micro in self._micros.values():
                        if micro.train and micro.step >= message.step:
                            micro.fail(_missed(message.step))
            elif isinstance(message, Fault) and message.micro is not None:
                self._unanswered.discard(message.micro)
                asked = self._micros.get(message.micro)
                if asked is not None:
                    asked.fail(_missed(asked.step) if message.code == "stale" else SessionLost(message.text, message.code))
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

    def _check(self) -> None:
        if self._lost is not None:
            raise self._lost
