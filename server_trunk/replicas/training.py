"""The optimizer steps of replicas that train one set of weights.

``sync: step``: gradients are summed over all replicas and divided by the target tokens counted on all, so each replica makes the
same step as one server would, to the bit. ``sync: K``: each makes K steps of its own, then the weights are averaged (local SGD,
Stich, arXiv 1805.09767; FL-GLM's server-hierarchical, arXiv 2406.14898, section 3.4).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn import Module

from server_trunk.replicas.buckets import Averages
from server_trunk.replicas.group import Group
from server_trunk.replicas.meetings import Meetings
from server_trunk.replicas.shared import SharedSums
from server_trunk.replicas.sums import EarlySums, Sums
from server_trunk.sharding.group import ShardGroup
from server_trunk.sharding.training import ShardedTraining
from server_trunk.training import SharedTraining, StepReport
from splitfl.config import OptimizerSettings, RunConfig

__all__ = ["AveragedTraining", "ReducedTraining", "replica_training"]


class ReducedTraining(SharedTraining):
    """``sync: step``. Every replica calls the same sums in the same order, once a step, whatever it has contributed."""

    def __init__(self, model: Module, settings: OptimizerSettings, group: Group, *more: Any) -> None:
        """``more``: where the trunk is sharded. All replicas must make theirs at the same point."""
        super().__init__(model, settings, *more)
        self._sums: Sums | SharedSums | None = None
        if self._parameters:
            shared = None if more else SharedSums.of(self._stepped, group)
            self._sums = shared or Sums(self._stepped, group.gradients)

    @property
    def leaves_early(self) -> bool:
        """Whether there is anything in knowing which backward is a step's last."""
        return isinstance(self._sums, Sums)

    def early(self, *, in_place: bool) -> EarlySums | None:
        sums = self._sums
        return EarlySums(sums, in_place=in_place) if isinstance(sums, Sums) and not sums.left else None

    def begin(self, targets: int) -> None:
        """Nothing more of this replica counts towards the step, of ``targets`` target tokens: its gradients leave now, while
        others are still at work, if they have not already.
        """
        if self._sums is not None:
            self._bring()
            self._sums.begin(targets)

    def close(self, step: int, targets: Mapping[str, int]) -> StepReport:
        counted = sum(targets.values())
        if self._sums is not None:
            if not self._sums.is_whole:
                self.begin(counted)
            counted = self._sums.finish()
        return self._step(step, counted)


class AveragedTraining(SharedTraining):
    """``sync: K``. The average weighs each replica by the target tokens it has counted since the last one; one without any takes
    the average. The optimizer's state stays each replica's own.
    """

    def __init__(self, model: Module, settings: OptimizerSettings, group: Group, meetings: Meetings, *more: Any) -> None:
        super().__init__(model, settings, *more)
        self._meetings = meetings
        self._averages = Averages(self._stepped, group.gradients) if self._parameters else None
        self._counted = 0  # target tokens since the last average

    def close(self, step: int, targets: Mapping[str, int]) -> StepReport:
        report = super().close(step, targets)
        self._counted += sum(targets.values())
        if self._meetings.meets_at(step):
            self.average()
        return report

    def average(self) -> None:
        """All replicas must call it at the same point. Raises SplitflError where one is gone."""
        if self._averages is not None:
            self._moved = True
            self._bring()
            self._averages.take(self._counted)
        self._counted = 0


class _ReducedShards(ReducedTraining, ShardedTraining):
    """Each rank sums its own part with those that hold the same part in the other replicas."""


class _AveragedShards(AveragedTraining, ShardedTraining):
    """Each rank averages its own part with those that hold the same part in the other replicas."""


def replica_training(
    config: RunConfig, model: Module, group: Group, shards: ShardGroup | None = None
) -> ReducedTraining | AveragedTraining:
    """The training of one replica, or of one rank of it: every process of all replicas makes one."""
    more = () if shards is None else (shards,)
    if config.sync == "step":
        return (_ReducedShards if shards else ReducedTraining)(model, config.optimizer, group, *more)
    return (_AveragedShards if shards else AveragedTraining)(model, config.optimizer, group, Meetings.of(config), *more)
