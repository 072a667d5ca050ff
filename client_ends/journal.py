"""What a client has sent of the steps that may still have to be sent again. Pure bookkeeping; no threads.

A hidden state is a function of the ends as they were, and its gradient of what came back: both are kept as they were sent, so
that a part can be sent again to the byte, whatever the ends have become. Kept are the part under way and the newest that is done,
until the word comes that its step has closed: in memory, two payloads a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from splitfl.protocol.messages import Backward, Forward, StepDone

__all__ = ["Journal", "PartSent"]


@dataclass(slots=True)
class PartSent:
    """This client's part of ``step``. ``order``: numbers of micro-batches, and whether it was the backward that was sent."""

    step: int
    order: list[tuple[int, bool]] = field(default_factory=list)
    forwards: dict[int, tuple[Forward, torch.Tensor]] = field(default_factory=dict)
    backwards: dict[int, tuple[Backward, torch.Tensor]] = field(default_factory=dict)
    done: StepDone | None = None


class Journal:
    """Parts in the order of their steps: at most one that is done, and one under way."""

    def __init__(self) -> None:
        self._parts: list[PartSent] = []

    @property
    def last(self) -> PartSent | None:
        """The part that is done and whose step is not known to have closed."""
        return next((part for part in self._parts if part.done is not None), None)

    @property
    def present(self) -> PartSent | None:
        """The part under way, from its first forward on."""
        return next((part for part in self._parts if part.done is None), None)

    def forward(self, message: Forward, payload: torch.Tensor) -> None:
        part = self.present
        if part is None:
            part = PartSent(message.step)
            self._parts.append(part)
        part.order.append((message.micro, False))
        part.forwards[message.micro] = message, payload

    def backward(self, message: Backward, payload: torch.Tensor) -> None:
        part = self.present
        if part is not None:
            part.order.append((message.micro, True))
            part.backwards[message.micro] = message, payload

    def done(self, message: StepDone) -> None:
        """The part under way is done; the one before it must have been received."""
        part = self.present or PartSent(message.step)
        part.done = message
        self._parts = [part]

    def closed(self, step: int) -> None:
        """``step`` and all before it need not be sent again."""
        self._parts = [part for part in self._parts if part.step > step]

    def drop_present(self) -> None:
        """Nothing of the part under way counts any more."""
        self._parts = [part for part in self._parts if part.done is not None]
