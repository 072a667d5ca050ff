"""One replica of ``test_replicas_sums``: sums and averages, where a replica lacks some, and what it ends with."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from torch import nn

from server_trunk.replicas import buckets
from server_trunk.replicas.group import Group
from server_trunk.replicas.meetings import Meetings
from server_trunk.replicas.place import Place
from server_trunk.replicas.shared import share
from server_trunk.replicas.training import AveragedTraining, ReducedTraining
from splitfl.config import OptimizerSettings

SETTINGS = OptimizerSettings(learning_rate=0.1, weight_decay=0.5, clip=0.0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Parameter(torch.randn(5, 3))
        self.turned = nn.Parameter(torch.randn(4, 6).t())
        self.narrow = nn.Parameter(torch.randn(7, dtype=torch.bfloat16))
        self.unused = nn.Parameter(torch.randn(3))


def gradients(model: nn.Module, rank: int, step: int) -> None:
    torch.manual_seed(100 * step + rank)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape).to(parameter.dtype)
        if name != "unused" and not (rank == 1 and name == "first"):  # one replica has none of it
            parameter.grad = torch.empty_like(parameter).copy_(drawn)


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def main(out: str) -> None:
    buckets.BUCKET_BYTES["gloo"] = 64  # several, of unequal size
    group = Group.join(Place.from_environment(), torch.device("cpu"))
    found: dict[str, Any] = {
        "reduced": _summed("reduced", group, machine=group.rank),
        "shared": _summed("shared", group, machine=0),
        "without_room": _without_room(group),
        **_averaged(group),
    }
    sums = [torch.full((2,), float(group.rank)), torch.tensor(group.rank)]
    group.all_reduce_tensors(sums)
    torch.save(found | {"sums": sums}, f"{out}/{group.rank}.pt")


def _summed(kind: str, group: Group, machine: int) -> dict[str, torch.Tensor]:
    group.place = dataclasses.replace(group.place, machine=machine)
    rank, model = group.rank, Model()
    training = ReducedTraining(model, SETTINGS, group)
    assert training.leaves_early == (kind == "reduced")
    for step, targets in enumerate([{0: 10, 1: 20, 2: 0}, {0: 0, 1: 0, 2: 0}, {0: 1, 1: 2, 2: 3}]):
        gradients(model, rank, step)
        if rank == 2:
            model.zero_grad()  # nobody is here
        if step == 2:
            training.begin(targets[rank])
        report = training.close(step, {"a": targets[rank]} if rank < 2 else {})
        assert report.skipped == (step == 1), report
    return copied(model)


def _without_room(group: Group) -> bool:
    """Whether none shares where one has no room."""

    def no_room(*_: Any) -> None:
        raise OSError("no space left")

    room = os.posix_fallocate
    assert share(64, group) is not None
    if group.rank == 1:
        os.posix_fallocate = no_room
    try:
        return share(64, group) is None
    finally:
        os.posix_fallocate = room


def _averaged(group: Group) -> dict[str, dict[str, torch.Tensor]]:
    model = Model()
    training = AveragedTraining(model, SETTINGS, group, Meetings(every=2))
    found = {}
    for step, targets in enumerate([{0: 10, 1: 20}, {0: 5}, {}, {}]):
        gradients(model, group.rank, step)
        training.close(step, {"a": targets.get(group.rank, 0)})
        if step == 0:
            found["apart"] = copied(model)
    return found | {"averaged": copied(model)}
