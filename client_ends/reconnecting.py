"""A link that was lost is had again: another session, with a new ticket, secrets and keys, that goes on where the lost one was.

A thread of its own connects, and says which session the new one stands for. Where this client had a part in a step it enrols
again, and the step that the server then opens for it says what was lost: a part that is not whole there is sent again, from the
journal; nothing of it counts twice. The training thread meanwhile waits, or computes; it hears of it only where the run has gone
on without its part, or has gone back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from client_ends.journal import Journal, PartSent
from client_ends.micro import missed
from client_ends.participant import Participant
from client_ends.retrying import may_pass, pause_before
from splitfl.channel.client import ClientChannel, OnLost
from splitfl.errors import ConfigError, RunComplete, RunWentBack, SessionLost, SplitflError
from splitfl.protocol.messages import AskNorm, Backward, Forward, Hidden, Pause, RefusalCode, StepClosed, TrunkNorm, Welcome
from splitfl.tensors import byte_view

__all__ = ["Reconnecting"]

_log = logging.getLogger(__name__)

#: Terms of a run without which it is another run.
_BINDING = ("identity", "cut", "seed", "mode", "trainables", "adapters", "lora", "dtype")


class _Cut(Exception):
    """What was waited for will not come in this session."""


class Reconnecting(Participant):
    """The thread that connects again, and what it needs."""

    def __init__(self) -> None:
        super().__init__()
        self._open_channel: Callable[[str, OnLost], ClientChannel] | None = None
        self._links = 0  # attempts to open one; what is heard of the loss of an older one is passed over
        self._restorer: threading.Thread | None = None
        self._broken: SplitflError | None = None  # why the newest link is down
        self._closing = False
        self._asked: dict[int, tuple[Forward, torch.Tensor]] = {}  # evaluation forwards that are not answered
        self._heard: set[tuple[int, bool]] = set()  # by number: answers to what was sent again, and whether it was a Hidden
        self._repeated: set[int] = set()  # micro-batches that were sent again in this session
        self._bytes = (0, 0)  # of the sessions before
        self._norm_asked: AskNorm | None = None  # for the norm of the trunk's gradient in the present step
        self._norm: TrunkNorm | None = None  # the answer
        self.on_link: Callable[[str], None] = lambda text: None  # hears in one line what befalls the link

    def _begin(self, open_channel: Callable[[str, OnLost], ClientChannel], reconnect: float, replaces: str) -> None:
        self._open_channel = open_channel
        # Who had a session before has been killed, and its server may have been too.
        give_up = time.monotonic() + (reconnect if replaces else 0.0)
        for attempt in itertools.count():
            try:
                self._first(replaces, reconnect)
                return
            except SplitflError as error:
                if not may_pass(error) or time.monotonic() >= give_up:
                    raise
            time.sleep(pause_before(attempt))

    def _first(self, replaces: str, reconnect: float) -> None:
        with self._lock:  # a link that breaks at once is heard of when all is in place
            self._channel = self._connect(replaces)
            self._reconnect = reconnect
            if reconnect and self._has_barrier:
                self._journal = Journal()

    @property
    def bytes_sent(self) -> int:
        return self._bytes[0] + self.channel.bytes_sent

    @property
    def bytes_received(self) -> int:
        return self._bytes[1] + self.channel.bytes_received

    def close(self, *, leave: bool = True) -> None:
        """End the session, after what is queued has left. Without ``leave`` this client is waited for as a lost one is."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        if self._channel is not None:
            self._channel.close(leave=leave)
            if leave and self._channel.ended_by == RefusalCode.MOVED:
                self._leave_elsewhere(self._channel.opened.session)
        with self._lock:
            self._give_up_link(SessionLost("the session was closed", "closed"))

    def _leave_elsewhere(self, moved: str) -> None:
        """The server has sent this client to another replica instead of hearing that it leaves; there it is waited for."""
        if self._restorer is not None:
            self._restorer.join()
        with contextlib.suppress(SplitflError):
            self._connect(moved).close()

    # --- what is sent, and sent again -------------------------------------------------------------------------------------------

    def _send(self, message: Forward | Backward, payload: torch.Tensor) -> None:
        """Send, and keep for the next session; the lock is held. Raises LocalProtocolError, then it is not kept."""
        try:
            self.channel.send(message, byte_view(payload))
        except SessionLost:
            if not self._reconnect:
                raise
        if not self._reconnect:
            return
        if isinstance(message, Forward) and not message.grad:
            self._asked[message.micro] = message, payload
        elif self._journal is not None and isinstance(message, Forward):
            self._journal.forward(message, payload)
        elif self._journal is not None and isinstance(message, Backward):
            self._journal.backward(message, payload)

    def _heard_again(self, message: Any) -> bool:
        """An answer has come; returns whether it is to something that was sent again."""
        with self._lock:
            self._asked.pop(message.micro, None)
            again = message.micro in self._repeated
            if again and not self._placed:
                self._heard.add((message.micro, isinstance(message, Hidden)))
                self._lock.notify_all()
            return again

    def _clear_step(self) -> None:
        self._norm_asked = self._norm = None
        super()._clear_step()

    # --- a link is lost ---------------------------------------------------------------------------------------------------------

    def _lose(self, link: int, error: SplitflError) -> None:
        with self._lock:
            if link != self._links:
                return
            if isinstance(error, SessionLost) and error.code == RefusalCode.ENDS:
                error = ConfigError(str(error))  # the user's to mend
            self._up = False
            self._broken = error
            if self._closing or not self._reconnect or not may_pass(error):
                self._give_up_link(error)
            elif self._restorer is None and self._lost is None:
                self._placed = False
                self._restorer = threading.Thread(target=self._restore, args=(error,), name="splitfl-reconnect", daemon=True)
                self._restorer.start()
            self._lock.notify_all()

    def _give_up_link(self, error: SplitflError) -> None:
        """From now on every call raises. The lock is held."""
        self._lost = self._lost or error
        for micro in self._micros.values():
            micro.fail(self._lost)
        self._lock.notify_all()

    def _restore(self, lost: SplitflError) -> None:
        """Connect until a session stands; on a thread of its own."""
        began, attempt, error = time.monotonic(), 0, lost
        is_moved = isinstance(lost, SessionLost) and lost.code == RefusalCode.MOVED
        self.on_link(f"{lost}; connecting again for up to {self._reconnect:g} s")
        while not self._closing:
            with self._lock:
                # Who is moved is waited for, and finds the server there.
                self._lock.wait_for(lambda: self._closing, 0.0 if is_moved and not attempt else pause_before(attempt))
                self._broken = None
            try:
                if not self._closing and self._take(self._connect(self.channel.opened.session)):
                    self.on_link(f"connected again after {time.monotonic() - began:.1f} s")
                    return
                error = self._broken or error
            except SplitflError as failed:
                error = failed
            except Exception as failed:
                _log.exception("connecting again failed")
                error = SessionLost(f"connecting again failed: {failed}", "internal")
            attempt += 1
            late = time.monotonic() - began >= self._reconnect
            if late or self._lost is not None or not may_pass(error):
                text = f"{lost}; no other session could be had for {self._reconnect:g} s: {error}"
                with self._lock:
                    self._give_up_link(SessionLost(text) if may_pass(error) else error)
                return

    def _connect(self, replaces: str) -> ClientChannel:
        assert self._open_channel is not None
        self._links += 1
        return self._open_channel(replaces, functools.partial(self._lose, self._links))

    def _same_run(self, welcome: Welcome) -> None:
        """Raises ConfigError where the server came back with another run."""
        if self._channel is None:
            return
        for name in _BINDING:
            if welcome.config.get(name) != self.terms.get(name):
                raise ConfigError(f"the server came back with another run ({name} differs): join it anew, under another --out")

    # --- where the new session stands -------------------------------------------------------------------------------------------

    def _take(self, channel: ClientChannel) -> bool:
        """Go on in a new session; False where it was lost before all was in place."""
        with self._lock:
            if not self._closing and self._broken is None:
                return self._go_on_in(channel)
        channel.close(leave=False)
        return False

    def _go_on_in(self, channel: ClientChannel) -> bool:
        """As :meth:`_take`, of a session that stands. The lock is held."""
        before = self.channel
        self._bytes = self._bytes[0] + before.bytes_sent, self._bytes[1] + before.bytes_received
        self._channel, self._up = channel, True
        self._heard.clear()
        self._repeated.clear()
        self._unanswered.clear()
        if self.rounds is not None:
            self.rounds.begin_session()
        try:
            self._ask_again(channel.opened.step)
            self._place(channel.opened.step)
        except (_Cut, SessionLost):
            late = self._dropped is not None and self._broken is None and not self._closing and self._lost is None
            if not late:
                return False
        self._placed, self._restorer = True, None
        self._lock.notify_all()
        return True

    def _ask_again(self, stands: int) -> None:
        """Evaluation: on the weights as they are, should the run have gone back."""
        for number, (message, payload) in list(self._asked.items()):
            if self._has_barrier and message.step > stands:
                message = dataclasses.replace(message, step=stands)
                if number in self._micros:
                    self._micros[number].step = stands
            self._repeated.add(number)
            self.channel.send(message, byte_view(payload))
            self._asked[number] = message, payload
        self._lock.notify_all()

    def _place(self, stands: int) -> None:
        """Learn which step this client is in, and bring the server what it has lost. The lock is held."""
        wanted = self._enrolled or self._enrolling
        last = self._journal.last if self._journal is not None else None
        if self._journal is None:
            self._have_closed(self.step - 1)  # the server tells nobody but the session that is gone
        # Whoever awaits the end of a round enrols once more: so it is given the average.
        settled = self.rounds is None or self.rounds.is_over
        if last is not None and not wanted and stands > last.step and settled:
            self._have_closed(last.step)
            last = None
        if not wanted and last is None and settled:
            self.channel.tell(Pause())  # who was moved is waited for
            return
        self._opened = self._dropped = None
        self._complete = False  # this session hears of it too, after the average that it may have missed
        for message in self._declaration():
            self.channel.tell(message)
        self.channel.tell(self._enrolment())
        self._until(lambda: self._opened is not None or self._complete)
        if self._enrolling:
            return  # who waits for a step to open looks for itself
        if self._opened is None:
            self._enrolled = False
            self._have_closed(self.step - 1)
            if self._forwards:
                self._befalls(RunComplete("the run made its last step while the link was down"))
        elif self._journal is None:
            self._go_on_from(self._opened)
        elif not wanted:
            self._owe(last, self._opened)
        elif self._opened == self.step:
            self._have_closed(self.step - 1)
            self._repeat(self._journal.present)
        elif last is not None and self._opened == last.step:
            self._repeat(last)
            self._repeat(self._journal.present)
        else:
            self._go_on_from(self._opened)

    def _owe(self, last: PartSent | None, opened: int) -> None:
        """This client takes part in no further step; does the server have its last part?"""
        if last is not None and opened == last.step:
            assert last.done is not None
            then = "leave" if last.done.then == "leave" else "pause"
            self._repeat(dataclasses.replace(last, done=dataclasses.replace(last.done, then=then)))
            return
        self.channel.tell(Pause())
        if opened < self.step:
            self._go_on_from(opened)
        else:
            self._have_closed(self.step - 1)

    def _go_on_from(self, opened: int) -> None:
        """The step that this client was in is not the one that it is in now."""
        if opened < self.step and self._has_barrier:
            self._befalls(RunWentBack(opened))
        elif self._forwards:
            self._befalls(missed(self.step, "was away"))
        if self._journal is not None:
            self._journal.closed(max(opened, self.step))
        if self._has_barrier:
            self._have_closed(opened - 1)
        else:
            self._closed = StepClosed(opened - 1, 0, 0, 0.0, None)  # each session numbers its own
        self.step = opened

    def _befalls(self, fate: SplitflError) -> None:
        """Of the part under way nothing is awaited any more; the training thread is told once."""
        self._away = self._fate = fate
        if self.rounds is not None:
            self.rounds.excuse()
        for micro in self._micros.values():
            if micro.grad:
                micro.fail(fate)
        self._forwards = self._backwards = self._targets = 0
        self._norm_asked = self._norm = None

    def _have_closed(self, step: int) -> None:
        """``step`` closed while nobody here heard it."""
        if self._journal is not None:
            self._journal.closed(step)
        if self.rounds is not None:
            self.rounds.stands_before(step + 1)
        if step >= 0 and (self._closed is None or self._closed.step < step):
            self._closed = StepClosed(step, 0, 0, 0.0, None)

    def _repeat(self, part: PartSent | None) -> None:
        """Send a part again, in the order in which it was sent.

        Each forward is answered before the next message leaves. The trunk would else run several in one batch whose
        backward waits for all their gradients, where this client awaits the first before it computes the second.
        """
        if part is None:
            return
        owed: list[tuple[int, bool]] = []
        for number, is_backward in part.order:
            if is_backward:
                message, payload = part.backwards[number]
                if message.want_grad:
                    owed.append((number, False))
                self.channel.send(message, byte_view(payload))
            else:
                self._until(lambda: all(each in self._heard for each in owed))
                forward, hidden = part.forwards[number]
                self._repeated.add(number)
                self._unanswered.add(number)
                self.channel.send(forward, byte_view(hidden))
                self._until(functools.partial(self._heard.__contains__, (number, True)))
        if part.done is not None:
            self.channel.tell(part.done)
        elif self._norm_asked is not None and self._norm is None:
            self.channel.tell(self._norm_asked)

    def _until(self, true: Callable[[], bool]) -> None:
        """Wait; raises _Cut where the link breaks meanwhile, or the step goes on without this client."""

        def ended() -> bool:
            return self._broken is not None or self._closing or self._lost is not None or self._dropped is not None

        self._lock.wait_for(lambda: true() or ended())
        if ended():
            raise _Cut
