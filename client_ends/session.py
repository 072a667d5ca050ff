"""A client's session with the trunk: what was asked and is awaited.

The channel's I/O thread fills futures; the training thread sends and waits. Nothing here knows about autograd or models.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from client_ends.micro import Micro, anew
from client_ends.reconnecting import Reconnecting
from splitfl.channel.client import ClientChannel, OnLost
from splitfl.channel.opening import OpenTerms
from splitfl.errors import (
    LocalProtocolError,
    RemoteProtocolError,
    RunComplete,
    RunWentBack,
    SessionLost,
    SplitflError,
    StepMissed,
    UserError,
)
from splitfl.libraries import library_versions
from splitfl.protocol.data import MAX_SEGMENTS
from splitfl.protocol.join import JoinString
from splitfl.protocol.keys import Identity
from splitfl.protocol.messages import (
    AskNorm,
    AveragePart,
    Backward,
    Fault,
    Forward,
    Hidden,
    RefusalCode,
    Release,
    TrunkNorm,
    Welcome,
)
from splitfl.tensors import DTYPES, dtype_name, receive_buffer

__all__ = ["TrunkSession"]

_log = logging.getLogger(__name__)


class TrunkSession(Reconnecting):
    """One client's presence. Made by :meth:`open`; ended by :meth:`close`, or by the loss of a link that is not to be had again,
    after which every call raises.
    """

    def __init__(self) -> None:
        super().__init__()
        self.uncounted = 0  # micro-batches whose gradient counted as zero in the trunk
        self.on_uncounted: Callable[[str], None] = _log.warning  # hears in one line of each; must not block
        self._sequences = itertools.count()
        self._released: deque[int] = deque()  # sequences that the trunk need not keep

    @classmethod
    def open(
        cls,
        join: JoinString,
        identity: Identity,
        answer: Callable[[Welcome], OpenTerms],
        *,
        timeout: float = 10.0,
        reconnect: float = 0.0,
        replaces: str = "",
        **channel_options: Any,
    ) -> TrunkSession:
        """Connect and open a session. ``answer`` sees the run's terms and says what this client holds.

        ``reconnect``: seconds for which a link that was lost is tried to be had again (0: not at all). ``replaces``: a session
        of this client's that was lost when its process was; then the server is waited for as long, as it may be gone too.
        ``channel_options``: further arguments of :meth:`ClientChannel.open`, for tests and benchmarks; ``transport`` may be
        what makes one, as each serves one session.

        Raises:
            ConnectError, Refused: with one sentence that says why and what to do.
        """
        session = cls()
        transport = channel_options.pop("transport", None)
        make = transport if callable(transport) else lambda: transport
        library = library_versions()

        def agree(welcome: Welcome, replaces: str) -> OpenTerms:
            session._same_run(welcome)
            return dataclasses.replace(answer(welcome), replaces=replaces)

        def opening(replaces: str, on_lost: OnLost) -> ClientChannel:
            return ClientChannel.open(
                join,
                identity,
                name="",
                libraries=library,
                answer=lambda welcome: agree(welcome, replaces),
                allocate=session._allocate,
                on_data=session._on_data,
                on_control=session._on_control,
                on_lost=on_lost,
                transport=make(),
                timeout=timeout,
                **channel_options,
            )

        once = transport is not None and not callable(transport)
        session._begin(opening, 0.0 if once else reconnect, replaces)
        return session

    @property
    def dtype(self) -> torch.dtype:
        """What hidden states travel in: the run's own."""
        return DTYPES[self.terms["dtype"]]

    @property
    def max_rows(self) -> int:
        """The most tokens one message can carry."""
        return int(self.channel.max_message // (self.terms["hidden_size"] * DTYPES[self.terms["dtype"]].itemsize))

    # --- tensors out and in -----------------------------------------------------------------------------------------------------

    def send_forward(
        self,
        flat: torch.Tensor,
        segments: Sequence[tuple[int, int]],
        *,
        train: bool,
        grad: bool,
        adapter_on: bool = True,
        sequences: Sequence[tuple[int, tuple[int, int]]] = (),
    ) -> int:
        """Send hidden states ``(tokens, hidden)`` and return the micro-batch's number. The tensor must not be changed
        afterwards. ``sequences``: what each segment follows, as :class:`Forward` has it; then the answer may be CacheLost.
        """
        self._check()
        host = flat.detach().to("cpu").contiguous()
        rows, hidden = host.shape
        dtype = dtype_name(host.dtype)
        # What is kept and what is sent must not come apart: who connects again sends what was kept.
        with self._lock:
            ordinal = 0
            if grad:
                self._begin_in_step()
                ordinal, self._forwards = self._forwards, self._forwards + 1
            else:
                self._await_link(steps=False)
            # A trunk in training mode belongs to a step; without one (``no_grad`` before the first) it runs in evaluation mode.
            train = train and self._enrolled
            number, self._next_micro = self._next_micro, self._next_micro + 1
            self._micros[number] = Micro(self.step, rows, hidden, dtype, grad)
            message = Forward(
                self.step, number, tuple(segments), hidden, dtype, "raw", train, grad, adapter_on, ordinal, tuple(sequences)
            )
            if self._released:
                self._send_released()
            if grad:
                self._unanswered.add(number)
            try:
                self._send(message, host)
            except LocalProtocolError:
                self._unanswered.discard(number)
                if not grad or not self._hears_of_drop():
                    raise
                self._check_missed()
                raise
        return number

    def new_sequence(self) -> int:
        """The number of a sequence that the trunk is to keep; no two of a client's have the same."""
        return next(self._sequences)

    def release_later(self, sequences: Sequence[int]) -> None:
        """The trunk need not keep these; it hears of it with the next forward. From any thread, amid anything."""
        self._released.extend(sequences)

    def _send_released(self) -> None:
        """The lock is held."""
        released = [self._released.popleft() for _ in range(min(len(self._released), MAX_SEGMENTS))]
        # What it is about has gone with the link, if that is down.
        with contextlib.suppress(SessionLost):
            self.channel.send(Release(tuple(released)), b"")

    def await_hidden(self, number: int) -> torch.Tensor:
        """The trunk's ``y: (tokens, hidden)`` for a forward, in host memory. Raises StepMissed, SessionLost."""
        return self._result(self._micros[number].y)

    def send_backward(self, number: int, gradient: torch.Tensor, *, targets: int, divisor: float, want_grad: bool = True) -> None:
        """Send ``dy: (tokens, hidden)``; the client's loss was a sum over ``targets`` in this micro-batch, divided by
        ``divisor``.

        Raises:
            UserError: more targets than tokens.
            StepMissed: the step went on without this client.
        """
        self._check()
        self._check_missed()
        host = gradient.detach().to("cpu").contiguous()
        rows, hidden = host.shape
        if targets > rows:
            raise UserError(
                f"{targets} targets in {rows} tokens: set the labels of padding to -100, or mend what objective() was given"
            )
        self._await_opened(self._micros[number].step)
        with self._lock:
            self._await_link()
            self._check_missed()
            step = self._micros[number].step
            self._backwards += 1
            self._targets += targets
            message = Backward(step, number, rows, hidden, dtype_name(host.dtype), "raw", targets, divisor, want_grad)
            self._send(message, host)

    def await_grad(self, number: int) -> torch.Tensor:
        """The trunk's ``dh: (tokens, hidden)`` for a backward, in host memory. Raises StepMissed, SessionLost."""
        gradient = self._result(self._micros[number].dh)
        self.forget(number)
        return gradient

    def _result(self, answer: Future[torch.Tensor]) -> torch.Tensor:
        with self.waits:
            error = answer.exception()
        if error is None:
            return answer.result()
        if isinstance(error, StepMissed | RunWentBack | RunComplete):
            with self._lock:
                if error is self._fate:
                    self._away = None
                else:
                    self._give_up()
        raise anew(error) if isinstance(error, SplitflError) else error

    @property
    def has_sent_since_norm(self) -> bool:
        """Whether a backward went out since the norm of the trunk's gradient was last asked for."""
        return self._norm_asked is None or self._norm_asked.backwards < self._backwards

    def trunk_norm(self) -> float:
        """The norm of the trunk's gradient of the step under way, over all gradients sent for it; 0 where the trunk will not use
        it. A forward of the step whose backward has not been sent by now has no gradient any more. Only in a run that clips both
        sides together.

        Raises:
            StepMissed, RunWentBack, SessionLost.
        """
        with self.waits, self._lock:
            self._await_link()
            self._norm_asked, self._norm = AskNorm(self.step, self._backwards), None
            self._tell(self._norm_asked)
            self._lock.wait_for(lambda: self._norm is not None or self._is_broken_off())
            if self._norm is None:
                self._check()
        self._check_missed()
        return 0.0 if self._norm is None or self._norm.norm is None else self._norm.norm

    def forget(self, number: int) -> None:
        """Nothing more is awaited of this micro-batch; what still comes of it is received and dropped."""
        with self._lock:
            self._micros.pop(number, None)

    # --- the I/O thread's side --------------------------------------------------------------------------------------------------

    def _allocate(self, message: Any) -> tuple[torch.Tensor | None, memoryview]:
        if isinstance(message, AveragePart):
            if self.rounds is None:
                raise RemoteProtocolError("an average of ends that are this client's own")
            return self.rounds.allocate(message)
        if not 0 <= message.micro < self._next_micro:
            raise RemoteProtocolError(f"an answer to micro-batch {message.micro}, which was never sent")
        micro = self._micros.get(message.micro)
        expected = (micro.step, micro.rows, micro.hidden, micro.dtype) if micro else None
        if expected is not None and (message.step, message.rows, message.hidden, message.dtype) != expected:
            raise RemoteProtocolError(f"an answer to micro-batch {message.micro} of another shape, step or dtype")
        return receive_buffer(message.rows, message.hidden, DTYPES[message.dtype])

    def _on_control(self, message: Any) -> None:
        if isinstance(message, Fault) and message.code == RefusalCode.NOT_COUNTED:
            self.uncounted += 1
            self.on_uncounted(f"micro-batch {message.micro}: {message.text}")
            return
        if isinstance(message, TrunkNorm):
            with self._lock:
                self._norm = message
                self._lock.notify_all()
            return
        if isinstance(message, Fault) and message.micro is not None:
            with self._lock:
                self._asked.pop(message.micro, None)
        super()._on_control(message)

    def _on_data(self, message: Any, payload: torch.Tensor) -> None:
        if isinstance(message, AveragePart):
            assert self.rounds is not None
            with self._lock:
                self.rounds.arrived(message)
                self._lock.notify_all()
            return
        if isinstance(message, Hidden):
            with self._lock:
                self._unanswered.discard(message.micro)
                self._lock.notify_all()
        again = self._heard_again(message)
        micro = self._micros.get(message.micro)
        if micro is None:
            return  # forgotten meanwhile: a forward whose loss was thrown away
        future = micro.y if isinstance(message, Hidden) else micro.dh
        with self._lock:  # whoever gives the link up fails what is not answered
            if not future.done():
                future.set_result(payload)
                return
        if again or self._lost is not None or isinstance(future.exception(), StepMissed):
            return  # answered before the link broke; or the word that its step is over has overtaken it
        raise RemoteProtocolError(f"a second answer to micro-batch {message.micro}")
