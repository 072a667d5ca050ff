"""The replicas of one server, joined by torch.distributed: who is there, and sums and averages over all of them.

Where a replica is several ranks, the world is replicas times ranks. Each rank has a group with its *counterparts*, which hold
the same shard in the other replicas: its gradients are summed there. The group of those that lead carries the words.

Three process groups, as each carries one thread's traffic in an order of its own: *gradients* (NCCL where each has a GPU of
its own, else gloo) is the trunk's thread's; *host* (gloo) is for tensors in host memory that are summed beside it; the *control*
group (gloo) carries small words. A replica that dies breaks its connections, which ends the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from server_trunk.plain_values import gather_values
from server_trunk.rendezvous import join_world
from server_trunk.replicas.place import Place
from splitfl.errors import ConfigError, SplitflError, first_line

__all__ = ["Group", "in_turn"]

#: A step may take as long as its clients take; a replica that is gone is known by its connection, not by its silence.
_PATIENCE = timedelta(days=365)

_T = TypeVar("_T")


class Group:
    """This process and its counterparts, one a replica: ``rank`` and ``size`` count replicas. Made by :meth:`join`, in every
    process at the same point.
    """

    @classmethod
    def join(cls, place: Place, device: torch.device | None, ranks: int = 1) -> Group:
        """Meet the other processes that torchrun has started; ``ranks`` of them, neighbours, are one replica. ``device``: where
        this process has its part of the trunk; None: on several.

        Raises:
            SplitflError: the group cannot be formed.
        """
        # Ranks of one trunk lay a mesh over the world, which needs what their devices speak.
        backend = "cpu:gloo,cuda:nccl" if ranks > 1 and device is not None and device.type == "cuda" else "gloo"
        join_world(backend, rank=place.rank, size=place.size, on_one_machine=place.local_size == place.size)
        return cls(place, device, ranks)

    def __init__(self, place: Place, device: torch.device | None, ranks: int = 1) -> None:
        self.place = place.among_replicas(ranks)
        self.rank, self.size = self.place.rank, self.place.size
        where = gather_values((place.machine, str(device)))
        # NCCL refuses two ranks on one device, and knows one device of a rank.
        single = device is not None and device.type == "cuda"
        apart = single and len(set(where)) == place.size and dist.is_nccl_available()
        self.backend = "nccl" if apart else "gloo"
        counterparts = [list(range(first, place.size, ranks)) for first in range(ranks)]
        self.control, self.gradients, self._host = (
            dist.new_subgroups_by_enumeration(counterparts, timeout=_PATIENCE, backend=backend)[0]
            for backend in ("gloo", self.backend, "gloo")
        )

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The plain value of every replica, by rank; lists come as tuples.

        All must call it; only before the control group carries words.
        """
        return gather_values(value, self.control)

    def agree(self, terms: dict[str, Any]) -> None:
        """Raises ConfigError where a replica was started with other terms than rank 0."""
        said = self.gather(terms)
        first, own = said[0], said[self.rank]
        odd = sorted(key for key in own.keys() | first.keys() if own.get(key) != first.get(key))
        if odd:
            theirs, mine = ({key: each.get(key) for key in odd} for each in (first, own))
            raise ConfigError(f"replica {self.rank} was started with {mine}, replica 0 with {theirs}: start all alike")

    def exchange(self, value: Any) -> list[Any]:
        """As :meth:`gather`, at any time; from the thread of :meth:`all_reduce_tensors`, in order with it. Raises SplitflError
        where a replica is gone.
        """
        try:
            return gather_values(value, self._host)
        except RuntimeError as error:
            raise SplitflError(f"another replica is gone: {first_line(error)}") from error

    def all_reduce_tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        """Sum tensors in host memory over all replicas, in place: each ends up equal everywhere, to the bit.

        All must call it with tensors of the same shapes and types, in the same order, from one thread. Raises SplitflError where
        a replica is gone.
        """
        try:
            for work in [dist.all_reduce(tensor, group=self._host, async_op=True) for tensor in tensors]:
                work.wait()
        except RuntimeError as error:
            raise SplitflError(f"another replica is gone: {first_line(error)}") from error


def in_turn(group: Group | None, work: Callable[[], _T]) -> _T:
    """Do ``work``: on rank 0 first, then on all others, so that what rank 0 makes the others find."""
    if group is None:
        return work()
    result = [work()] if group.is_first else []
    dist.barrier(group.control)
    return result[0] if group.is_first else work()
