"""The ranks that hold one trunk together, joined by torch.distributed from the environment that torchrun gives.

The world is replicas times ranks a trunk; the ranks of one trunk are neighbours, the first of them leads. Three ways between
them: *commands* from the leader, for which a follower may wait for as long as clients are silent; *votes*, which are awaited for
minutes; and the mesh, over which the model's own collectives run (NCCL between GPUs, gloo between CPUs).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import msgpack
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from server_trunk.plain_values import gather_values
from server_trunk.rendezvous import join_world
from splitfl.config import RunConfig
from splitfl.errors import ConfigError, GroupLost, first_line
from splitfl.parts.sharded import MESH_AXES, Sharding
from splitfl.tensors import DTYPES, dtype_name, resolve_device

__all__ = ["ShardGroup", "check_ranks", "join_shards", "own_device"]

# A follower hears nothing while clients are silent; that its leader has died it learns from the connection.
_FOR_EVER = timedelta(days=365)
_VOTE = timedelta(minutes=10)
# A rank that has failed may be the one which the others wait for, in a collective of the model's.
_VOTE_OF_FAILED = timedelta(minutes=1)

_T = TypeVar("_T")


class ShardGroup:
    """This rank's place among those of one trunk. Every method is called by all of them, in the same order."""

    def __init__(self, kind: str, size: int, device: torch.device) -> None:
        """Joins the world (unless it is joined) and makes the ways of all its groups; ``kind``: tensor or fsdp."""
        if not dist.is_initialized():
            together = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
            join_world("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", on_one_machine=together)
        replicas = dist.get_world_size() // size
        shape = (replicas, 1, 1, 1, size) if kind == "tensor" else (replicas, 1, 1, size, 1)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replica", *MESH_AXES))[MESH_AXES]
        self.sharding = Sharding(kind, mesh, device)
        self.device, self.size = device, size
        self.rank = dist.get_rank() % size
        self._first = dist.get_rank() - self.rank
        for replica in range(replicas):
            ranks = list(range(replica * size, replica * size + size))
            commands, votes = (dist.new_group(ranks, timeout=timeout, backend="gloo") for timeout in (_FOR_EVER, _VOTE))
            if ranks[0] == self._first:
                self._commands, self._votes = commands, votes
        self.mesh_group = mesh["tp" if kind == "tensor" else "fsdp"].get_group()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def use_device(self) -> None:
        """Make the group's device the calling thread's own: CUDA keeps that by thread, and collectives run on it."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    # --- commands ---------------------------------------------------------------------------------------------------------------

    def send(self, command: dict[str, Any], tensors: Sequence[torch.Tensor] = ()) -> None:
        """Leader: tell the followers what to run, and on what. Raises GroupLost."""
        about = [(list(tensor.shape), dtype_name(tensor.dtype)) for tensor in tensors]
        packed = torch.frombuffer(bytearray(msgpack.packb([command, about])), dtype=torch.uint8)
        self._broadcast(torch.tensor([packed.numel()]), self._commands)
        self._broadcast(packed, self._commands)
        for tensor in tensors:
            self._broadcast(tensor.to(self.device).contiguous().view(torch.uint8), self.mesh_group)

    def receive(self) -> tuple[dict[str, Any], list[torch.Tensor]]:
        """Follower: wait for the leader's next command; tensors on the device. Raises GroupLost."""
        length = torch.zeros(1, dtype=torch.int64)
        self._broadcast(length, self._commands)
        packed = torch.empty(int(length), dtype=torch.uint8)
        self._broadcast(packed, self._commands)
        command, about = msgpack.unpackb(packed.numpy().tobytes(), strict_map_key=False)
        tensors = [torch.empty(shape, dtype=DTYPES[dtype], device=self.device) for shape, dtype in about]
        for tensor in tensors:
            self._broadcast(tensor.view(torch.uint8), self.mesh_group)
        return command, tensors

    def broadcast(self, tensor: torch.Tensor) -> None:
        """The leader's values for everybody, in place. Raises GroupLost."""
        self._broadcast(tensor, self._commands if tensor.device.type == "cpu" else self.mesh_group)

    def _broadcast(self, tensor: torch.Tensor, group: Any) -> None:
        if tensor.numel():
            _guarded(lambda: dist.broadcast(tensor, self._first, group=group))

    # --- together ---------------------------------------------------------------------------------------------------------------

    def vote(self, vote: int) -> list[int]:
        """What each rank says: 1 where it went well, else anything below. Raises GroupLost where one does not answer; to a rank
        that has failed, within a minute.
        """
        votes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        patience = _VOTE if vote > 0 else _VOTE_OF_FAILED
        _guarded(lambda: dist.all_gather(votes, torch.tensor([int(vote)]), group=self._votes, async_op=True).wait(patience))
        return [int(each) for each in votes]

    @property
    def patient(self) -> Any:
        """A process group of all ranks for what may take long, in host memory."""
        return self._commands

    def gather(self, value: Any) -> list[Any]:
        """The plain value of every rank; lists come as tuples. Raises GroupLost."""
        return _guarded(lambda: gather_values(value, self._commands))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place; host memory or the device's. Raises GroupLost."""
        group = self._votes if tensor.device.type == "cpu" else self.mesh_group
        _guarded(lambda: dist.all_reduce(tensor, group=group))
        return tensor

    def gather_rows(self, rows: Sequence[torch.Tensor | None], own: torch.Tensor) -> None:
        """Fill the leader's ``rows`` with what each rank has; None of a rank that has nothing to give. Raises GroupLost."""
        if not self.leads:
            if rows[self.rank] is not None:
                _guarded(lambda: dist.send(own.contiguous(), self._first, group=self.mesh_group))
            return
        for rank, tensor in enumerate(rows):
            if rank and tensor is not None:
                _guarded(functools.partial(dist.recv, tensor, self._first + rank, group=self.mesh_group))


def _guarded(work: Callable[[], _T]) -> _T:
    try:
        return work()
    except RuntimeError as error:  # gloo's and NCCL's own
        said = first_line(error)
        raise GroupLost(f"another rank of this trunk is gone or does not answer ({said}): start the group again") from error


def join_shards(config: RunConfig) -> ShardGroup | None:
    """The group of a run whose trunk lies on several ranks; None where one process holds it.

    Raises ConfigError where the processes that were started are not those the config asks for.
    """
    if config.shard not in ("tensor", "fsdp"):
        return None
    check_ranks(config, dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1)))
    return ShardGroup(config.shard, config.ranks, own_device(config))


def check_ranks(config: RunConfig, world: int) -> None:
    """Raises ConfigError where ``world`` processes are not what the config asks for."""
    replicas = world // config.ranks
    several = config.mode == "hierarchical"
    if world % config.ranks or (replicas != 1 and not several) or (several and config.replicas not in (0, replicas)):
        asked = f"{config.replicas or 'some'} replicas of {config.ranks}" if several else f"{config.ranks}"
        raise ConfigError(f"{world} processes were started, where the config asks for {asked}: start as many, by torchrun")


def own_device(config: RunConfig) -> torch.device:
    """``auto`` or ``cuda``: the GPU of this process, by its number on the machine.

    Raises ConfigError where it has none of its own.
    """
    try:
        device = resolve_device(config.device)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ConfigError(f"a trunk cannot be sharded over {device.type} devices: use --device cpu or cuda")
    if device.index is not None:
        raise ConfigError(f"device = {config.device} would put every rank on one GPU: use --device cuda, which is one each")
    number = int(os.environ.get("LOCAL_RANK", 0))
    if number >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {number} of this machine has no GPU of its own ({torch.cuda.device_count()} here): start fewer processes"
        )
    own = torch.device("cuda", number)
    torch.cuda.set_device(own)
    return own
