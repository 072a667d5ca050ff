"""The trunk as one module of the client's model: sending and receiving are two autograd nodes.

Forward, all micro-batches of a call are sent, then each is awaited. Autograd runs the newest node first, so in backward
every ``dy`` is sent before any ``dh`` is awaited: while the trunk works on one micro-batch the next is already on its way,
and the order falls out of the graph. ``pieces.py`` enters the two halves of a call one by one, so that the ends overlap with it
too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from client_ends.objective import Objective
from client_ends.session import TrunkSession
from splitfl.errors import UserError
from splitfl.parts.segments import Segments, pack, segments_of, unpack

__all__ = ["HiddenSent", "RemoteTrunk", "cut_rows"]


class HiddenSent(Exception):
    """Leaves a family's forward at the trunk: the hidden states are sent, the rest is the second half's."""


@dataclass(slots=True)
class _Call:
    """One micro-batch of one call. ``rows`` are the batch rows ``begin..end`` it covers."""

    session: TrunkSession
    number: int
    objective: Objective | None
    rows: range
    device: torch.device
    want_grad: bool = False
    answered: bool = False


@dataclass(slots=True)
class _Underway:
    """What one call of the trunk has sent, and what puts the answers ``(tokens, hidden)`` back into rows."""

    calls: list[tuple[_Call, torch.Tensor]]
    segments: Segments
    shape: tuple[int, int]
    grad: bool


class _Send(torch.autograd.Function):
    """Forward: the hidden states leave. Backward: their gradient is awaited."""

    @staticmethod
    def forward(ctx: Any, flat: torch.Tensor, call: _Call, send: Callable[[torch.Tensor], int]) -> torch.Tensor:
        call.number = send(flat)
        ctx.call = call
        # Carries no number, only the order of the graph. On the CPU, so that `backward` waits in the thread that called it:
        # a device's autograd thread is one for the whole process, where the trunk may be waiting for it too.
        return flat.new_zeros(0, device="cpu")

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[torch.Tensor, None, None]:
        call: _Call = ctx.call
        return call.session.await_grad(call.number).to(call.device), None, None


class _Receive(torch.autograd.Function):
    """Forward: the trunk's output is awaited. Backward: its gradient leaves."""

    @staticmethod
    def forward(ctx: Any, link: torch.Tensor, call: _Call) -> torch.Tensor:
        ctx.call = call
        return call.session.await_hidden(call.number).to(call.device)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        call: _Call = ctx.call
        if call.objective is None or not call.objective.is_known:
            raise UserError(
                "the loss of this forward is unknown: pass labels= to the model, set model.objective(...), or call "
                "bind_trainer(trainer) before a Trainer with a loss of its own trains"
            )
        if call.answered:
            raise UserError("the trunk keeps the graph of a forward for one backward: add losses up and call backward() once")
        call.answered = True
        targets, divisor = call.objective.share(call.rows)
        call.session.send_backward(call.number, gradients[0], targets=targets, divisor=divisor, want_grad=call.want_grad)
        return gradients[0].new_zeros(0, device="cpu"), None


class RemoteTrunk:
    """Callable ``(h: (B, T, hidden), attention_mask, position_ids) -> (B, T, hidden)`` whose work is done by the server.

    ``micro_batches``: into how many pieces one call's rows are cut, so that network, trunk and the next piece overlap. Padding is
    dropped: what travels is the real tokens and their segments.
    """

    def __init__(self, session: TrunkSession, *, micro_batches: int = 1) -> None:
        self.session = session
        self.micro_batches = micro_batches
        self.training = True
        self.adapter_on = True
        self.ends_adapter_on = True  # PEFT's word on the ends, which holds for the trunk's too
        self.objective: Objective | None = None
        self.on_first_forward: Callable[[torch.Tensor], None] | None = None
        self._halfway = False
        self._first_row = 0
        self._sent: _Underway | None = None
        self._second_half: _Underway | None = None

    def __call__(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> torch.Tensor:
        if self._second_half is not None:
            return self._receive_rows(self._second_half, hidden_states)
        underway = self._send_rows(hidden_states, attention_mask, position_ids)
        if self._halfway:
            self._sent = underway
            raise HiddenSent
        return self._receive_rows(underway, hidden_states)

    @contextlib.contextmanager
    def first_half(self, row: int) -> Iterator[None]:
        """A call within sends, and raises :class:`HiddenSent`. Its first row is the batch's ``row``."""
        self._halfway, self._first_row = True, row
        try:
            yield
        finally:
            self._halfway, self._first_row = False, 0

    def take_sent(self) -> _Underway:
        """What the latest first half has sent."""
        sent, self._sent = self._sent, None
        assert sent is not None, "the forward never came to the trunk"
        return sent

    @contextlib.contextmanager
    def second_half(self, underway: _Underway) -> Iterator[None]:
        """A call within returns the trunk's answer to what was sent, whatever it is given."""
        self._second_half = underway
        try:
            yield
        finally:
            self._second_half = None

    def _send_rows(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> _Underway:
        batch, length = hidden_states.shape[:2]
        segments = segments_of(attention_mask, position_ids, (batch, length))
        # Under autocast, or with norms kept in fp32, it may be another than the run's.
        hidden_states = hidden_states.to(self.session.dtype)
        underway = _Underway([], segments, (batch, length), torch.is_grad_enabled() and self.training)
        for rows in self._cut(segments, batch):
            part = _of_rows(segments, rows)
            if not len(part):
                continue
            of_batch = range(self._first_row + rows.start, self._first_row + rows.stop)
            call = _Call(self.session, -1, self.objective, of_batch, hidden_states.device)
            link = self._send(pack(hidden_states[rows.start : rows.stop], part), part, call, underway.grad)
            underway.calls.append((call, link))
        return underway

    def _receive_rows(self, underway: _Underway, hidden_states: torch.Tensor) -> torch.Tensor:
        if not underway.calls:
            return torch.zeros_like(hidden_states)  # nothing but padding: nothing was sent
        outputs = [_Receive.apply(link, call) for call, link in underway.calls]
        if not underway.grad:
            for call, _ in underway.calls:
                self.session.forget(call.number)
        flat = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        if torch.is_grad_enabled() and not underway.grad:
            flat = _Refuse.apply(flat.requires_grad_())
        return unpack(flat.to(hidden_states.dtype), underway.segments, underway.shape)

    def takes_adapter(self) -> bool:
        """Whether the next forward runs with the trunk's adapter. Raises UserError where it shall not, and there is none."""
        adapter_on = self.adapter_on and self.ends_adapter_on
        if not adapter_on and self.session.terms["trainables"] == "full":
            raise UserError(
                "the trunk has no adapter to switch off, as this run trains its whole weights: for a reference pass ask the "
                "operator for a run with trainables = lora"
            )
        return adapter_on

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteTrunk:
        return self  # a copy of the ends talks to the same trunk

    def _send(self, flat: torch.Tensor, part: Segments, call: _Call, grad: bool) -> torch.Tensor:
        if self.on_first_forward is not None:
            self.on_first_forward(flat)
            self.on_first_forward = None

        adapter_on = self.takes_adapter()

        def send(tensor: torch.Tensor) -> int:
            return self.session.send_forward(tensor, part.wire, train=self.training, grad=grad, adapter_on=adapter_on)

        if grad and flat.requires_grad:
            call.want_grad = True
            link: torch.Tensor = _Send.apply(flat, call, send)
            return link
        call.number = send(flat)
        # With a frozen input end nobody wants dh, yet the trunk must get its dy: a leaf of our own keeps the graph alive.
        return flat.new_zeros(0, device="cpu").requires_grad_(grad)

    def _cut(self, segments: Segments, batch: int) -> list[range]:
        """Cut the rows into ``micro_batches``, and further where one would not fit a message.

        Raises:
            UserError: a single row is longer than a message may be.
        """
        tokens = [0] * batch
        for item in segments:
            tokens[item.row] += item.length
        limit = self.session.max_rows
        longest = max(tokens, default=0)
        if longest > limit:
            raise UserError(
                f"a row of {longest} tokens does not fit one message of the server ({limit} tokens); "
                "use shorter rows, or ask the operator for a larger window"
            )
        return cut_rows(tokens, 1 if self._halfway else self.micro_batches, limit)


def cut_rows(tokens: Sequence[int], count: int, limit: int | None = None) -> list[range]:
    """Cut rows of so many ``tokens`` into ``count`` runs of about equal length, and further where one would exceed ``limit``."""
    wanted = max(-(-sum(tokens) // max(1, count)), max(tokens, default=0))
    if limit is not None:
        wanted = min(wanted, limit)
    parts: list[range] = []
    begin = carried = 0
    for row, length in enumerate(tokens):
        if carried and carried + length > wanted:
            parts.append(range(begin, row))
            begin, carried = row, 0
        carried += length
    parts.append(range(begin, len(tokens)))
    return parts


def _of_rows(segments: Segments, rows: range) -> Segments:
    """The segments of some rows, counted from the first of them."""
    items = tuple(item._replace(row=item.row - rows.start) for item in segments if item.row in rows)
    return Segments(items, (len(rows), segments.shape[1]))


class _Refuse(torch.autograd.Function):
    """Stands where a graph would begin that the server does not keep, so that a backward through it is an error, not a
    silence.
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UserError("this forward ran in evaluation mode, for which the server keeps no graph: call model.train() first")
