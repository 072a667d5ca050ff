"""What is kept of a run of several replicas: rank 0 writes, behind the adapters that each has, and all say so together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from server_trunk.keeping import RunKeeper
from server_trunk.ledger import Ledger
from server_trunk.replicas.client_adapters import SpreadTraining
from server_trunk.replicas.group import Group
from server_trunk.replicas.meetings import Meetings
from splitfl.errors import CheckpointError, GroupLost

__all__ = ["ReplicaRun"]


class ReplicaRun:
    """As :class:`~server_trunk.stepkeeper.Run` asks for. Weights are equal on all replicas only where they have met: checkpoints
    wait for that, and the ledger enters there what has counted since the last time.
    """

    def __init__(self, keeper: RunKeeper, group: Group, meetings: Meetings) -> None:
        self._keeper, self._group, self._meetings = keeper, group, meetings

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint of ``step`` is to be written."""
        return self._meetings.meets_at(step) and self._keeper.is_due(step)

    def made(self, ledger: Ledger) -> bool:
        if not self._meetings.meets_at(ledger.step):
            return False
        self._enter(ledger)
        if not self._keeper.is_due(ledger.step):
            return False
        self.save(ledger.step)
        return True

    def _enter(self, ledger: Ledger) -> None:
        """Replicas have met after a step: what counted in those before it, at whichever replica, is entered there."""
        entered = self._keeper.ledger
        for step in range(entered.next_step(self._keeper.saved + 1), ledger.step):
            entered.enter(Ledger(step))
        entered.enter(ledger)

    def broke_off(self, closed: int | None, counted: Mapping[str, int]) -> int | None:
        """The run ends, amid a round: ``closed`` is the newest step that was made here, ``counted`` what counted by client since
        replicas met. All say so together; returns the newest step that any has made.
        """
        total: Counter[str] = Counter()
        steps = [closed]
        for step, theirs in self._group.exchange((closed, dict(counted))):
            steps.append(step)
            total.update(theirs)
        newest = max((step for step in steps if step is not None), default=None)
        if newest is not None and self._keeper.ledger.next_step(self._keeper.saved + 1) <= newest:
            self._enter(Ledger(newest, met=dict(total)))
        return newest

    def save(self, step: int) -> None:
        """Rank 0 writes the checkpoint; the others wait for it, as it must be there before anybody is told."""
        self.keep_adapters()
        if self._group.is_first:
            self._keeper.save(step)
        self._group.all_reduce_tensors([torch.zeros(1)])
        self._keeper.saved = step

    def keep_adapters(self) -> None:
        """Where each client has an adapter: every replica but rank 0 writes those that are its own to keep, and rank 0 knows
        of them. All do so together; the checkpoint that names them comes after.
        """
        training = self._keeper.training
        if isinstance(training, SpreadTraining):
            training.share()
            if not self._group.is_first:
                self._keeper.save_clients(training)
            self._group.exchange(None)

    def kept(self) -> Sequence[int]:
        return self._keeper.kept()

    def go_back(self, step: int) -> None:
        """All do so, on rank 0's word. It goes first, and puts newer checkpoints aside. Raises GroupLost where it is damaged: all
        have to start again, without it.
        """
        if self._group.is_first:
            try:
                self._keeper.go_back(step)
            except CheckpointError as error:
                raise GroupLost(f"{error} All replicas have to start again") from error
        self._group.all_reduce_tensors([torch.zeros(1)])
        if not self._group.is_first:
            self._keeper.go_back(step)
