"""When replicas meet: after every step, or after every K of them."""

from __future__ import annotations

from dataclasses import dataclass

from splitfl.config import RunConfig

__all__ = ["Meetings"]


@dataclass(frozen=True, slots=True)
class Meetings:
    """``every``: optimizer steps of a round, at whose last one all replicas meet. ``last``: steps of the run (0: no end); at its
    end they meet too.
    """

    every: int = 1
    last: int = 0

    @classmethod
    def of(cls, config: RunConfig) -> Meetings:
        return cls(config.local_steps, config.optimizer.steps)

    def last_of(self, step: int) -> int:
        """The last step of the round that ``step`` belongs to."""
        end = (step // self.every + 1) * self.every
        return (min(end, self.last) if self.last else end) - 1

    def meets_at(self, step: int) -> bool:
        """Whether replicas meet at the end of ``step``."""
        return step == self.last_of(step)
