"""Rounds that average the ends, as a client sees them: what it trains is said before it takes part, sent when the server asks,
and replaced by the average before the next training forward.

The channel's I/O thread sends and receives; the training thread waits, and alone writes to the ends. The average lies beside them
until it is whole, so a session that breaks leaves them as they were. The optimizer's state stays this client's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter

from splitfl.adapters.layout import Layout, PartCursor
from splitfl.errors import ConfigError, RemoteProtocolError, SessionLost
from splitfl.protocol.messages import AveragePart, EndsPart, RoundClosed, RoundOpened
from splitfl.tensors import byte_view

__all__ = ["EndsRounds"]


@dataclass
class _Incoming:
    """The average of one round on its way."""

    tensors: list[torch.Tensor]
    cursor: PartCursor
    left: int


class EndsRounds:
    """One session's rounds. ``steps``: how many a round has; ``part_bytes``: how long a part is; both are the run's terms."""

    def __init__(self, steps: int, part_bytes: int, trainables: Callable[[], Mapping[str, Parameter]]) -> None:
        """``trainables``: what of the ends trains, by its name in the full model; asked when the client first takes part."""
        self._steps, self._part_bytes, self._trainables = steps, part_bytes, trainables
        self._parameters: list[Parameter] = []
        self._layout = Layout(())
        self._declared = False  # in the present session
        self._due = -1  # the round that ended with this client's newest step, or whose average was lost on its way
        self._over = -1  # the newest round that is over
        self._averaged = -1  # the newest that has an average
        self._incoming: dict[int, _Incoming] = {}
        #: The round whose average the ends hold, or were trained on from. Who puts them back into an older state sets it too.
        self.loaded = -1

    # --- the training thread ----------------------------------------------------------------------------------------------------

    def declare(self) -> Layout | None:
        """What this client trains, to be said before it first takes part; None where that has been said.

        Raises:
            ConfigError: nothing of the ends is trained, or it cannot travel.
        """
        if self._declared:
            return None
        named = dict(sorted(self._trainables().items()))
        if not named:
            raise ConfigError("this run averages the clients' ends, and nothing of yours is trained: use --ends lora or full")
        try:
            self._layout = Layout.of(named)
        except ValueError as error:
            raise ConfigError(f"the ends cannot be averaged: {error}") from None
        self._parameters = list(named.values())
        self._declared = True
        return self._layout

    def begin_session(self) -> None:
        """Another session of this client begins: it has to be told anew, and hears anew which average is the newest. A round that
        is still due stays so, as the part of its last step may be sent again; one whose average was announced is due until the
        ends have that.
        """
        if self.is_over:
            self._due = self._averaged if self._averaged > self.loaded else -1
        self._declared = False
        self._over = self._averaged = -1  # lower than before where the run has gone back
        self._incoming = {}

    def stands_before(self, step: int) -> None:
        """The session takes part in ``step``: the rounds before it are over."""
        if self._due < step // self._steps:
            self._due = -1

    def step_ended(self, step: int) -> None:
        """This client's part of a step has ended; after the last of a round, the average is to be awaited."""
        if (step + 1) % self._steps == 0:
            self._due = (step + 1) // self._steps - 1

    def excuse(self) -> None:
        """No end of a round is awaited: the run went on without this client, or has gone back; it is given the average when it
        takes part again.
        """
        self._due = -1

    @property
    def is_settled(self) -> bool:
        """Whether the round that is due is over, and the newest average is here, or is no news."""
        incoming = self._incoming.get(self._averaged)
        return self.is_over and (self._averaged <= self.loaded or (incoming is not None and not incoming.left))

    @property
    def is_over(self) -> bool:
        """Whether no end of a round is awaited."""
        return self._over >= self._due

    def load(self) -> bool:
        """Put the newest average into the ends, in place; returns whether there was a newer one."""
        if self._averaged <= self.loaded:
            self._incoming = {number: one for number, one in self._incoming.items() if one.left or number > self._averaged}
            return False
        incoming = self._incoming[self._averaged]
        with torch.no_grad():
            for parameter, mean in zip(self._parameters, incoming.tensors, strict=True):
                parameter.copy_(mean)
        self.loaded = self._averaged
        self._incoming = {number: later for number, later in self._incoming.items() if number > self.loaded}
        return True

    # --- the I/O thread ---------------------------------------------------------------------------------------------------------

    def hear(self, message: RoundOpened | RoundClosed, send: Callable[[EndsPart, memoryview], None]) -> None:
        """The server asks for the ends, or says that a round is over."""
        if isinstance(message, RoundOpened):
            self._upload(message.round, send)
            return
        self._over = max(self._over, message.round)
        if message.members:
            self._averaged = max(self._averaged, message.round)

    def _upload(self, number: int, send: Callable[[EndsPart, memoryview], None]) -> None:
        """Queue the ends as they are; on a CPU straight from the parameters, which nothing changes before the round is over."""
        if not self._parameters:
            raise RemoteProtocolError("the server asks for ends that this client never spoke of")
        views: dict[int, memoryview] = {}
        for tensor, offset, size in self._layout.parts(self._part_bytes):
            if tensor not in views:
                views = {tensor: byte_view(self._parameters[tensor].detach().to("cpu").contiguous())}
            try:
                send(EndsPart(number, tensor, offset, size), views[tensor][offset : offset + size])
            except SessionLost:
                return  # this client is closing: the round goes on without it

    def allocate(self, message: AveragePart) -> tuple[None, memoryview]:
        """Where a part of an average goes."""
        incoming = self._incoming.get(message.round)
        if incoming is None:
            if not self._parameters or len(self._incoming) > 1:
                raise RemoteProtocolError(f"an average of round {message.round}, which this client does not await")
            tensors = [torch.empty(one.shape, dtype=one.dtype) for one in self._parameters]
            incoming = _Incoming(tensors, PartCursor(self._layout, self._part_bytes), self._layout.bytes)
            self._incoming[message.round] = incoming
        incoming.cursor.take(message)
        return None, byte_view(incoming.tensors[message.tensor])[message.offset : message.offset + message.size]

    def arrived(self, message: Any) -> None:
        """A part of an average is here."""
        incoming = self._incoming.get(message.round)
        if incoming is not None:
            incoming.left -= message.size
