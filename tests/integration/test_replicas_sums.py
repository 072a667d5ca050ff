"""Sums and averages over replicas, in processes of their own: equal everywhere to the bit, whatever a replica lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.relay import free_port

SIZE = 3

WORKER = """
import dataclasses
import os
import sys
import torch
from torch import nn
from server_trunk.replicas import buckets
from server_trunk.replicas.group import Group
from server_trunk.replicas.meetings import Meetings
from server_trunk.replicas.place import Place
from server_trunk.replicas.shared import share
from server_trunk.replicas.training import AveragedTraining, ReducedTraining
from splitfl.config import OptimizerSettings

buckets.BUCKET_BYTES["gloo"] = 64  # several, of unequal size
place = Place.from_environment()
group = Group.join(place, torch.device("cpu"))
rank = group.rank


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Parameter(torch.randn(5, 3))
        self.turned = nn.Parameter(torch.randn(4, 6).t())
        self.narrow = nn.Parameter(torch.randn(7, dtype=torch.bfloat16))
        self.unused = nn.Parameter(torch.randn(3))


def gradients(model, seed):
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape).to(parameter.dtype)
        if name != "unused" and not (rank == 1 and name == "first"):  # one replica has none of it
            parameter.grad = torch.empty_like(parameter).copy_(drawn)


found = {}
settings = OptimizerSettings(learning_rate=0.1, weight_decay=0.5, clip=0.0)
for kind, machine in (("reduced", rank), ("shared", 0)):
    group.place = dataclasses.replace(group.place, machine=machine)
    model = Model()
    training = ReducedTraining(model, settings, group)
    assert training.leaves_early == (kind == "reduced")
    for step, targets in enumerate([{0: 10, 1: 20, 2: 0}, {0: 0, 1: 0, 2: 0}, {0: 1, 1: 2, 2: 3}]):
        gradients(model, 100 * step + rank)
        if rank == 2:
            model.zero_grad()  # nobody is here
        if step == 2:
            training.begin(targets[rank])
        report = training.close(step, {"a": targets[rank]} if rank < 2 else {})
        assert report.skipped == (step == 1), report
    found[kind] = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def no_room(*_):
    raise OSError("no space left")


room = os.posix_fallocate
assert share(64, group) is not None
if rank == 1:
    os.posix_fallocate = no_room
found["without_room"] = share(64, group) is None
os.posix_fallocate = room

model = Model()
training = AveragedTraining(model, settings, group, Meetings(every=2))
for step, targets in enumerate([{0: 10, 1: 20}, {0: 5}, {}, {}]):
    gradients(model, 100 * step + rank)
    training.close(step, {"a": targets.get(rank, 0)})
    if step == 0:
        found["apart"] = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
found["averaged"] = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
sums = [torch.full((2,), float(rank)), torch.tensor(rank)]
group.all_reduce_tensors(sums)
found["sums"] = sums
torch.save(found, f"{sys.argv[1]}/{rank}.pt")
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each rank ended with."""
    work: Path = tmp_path_factory.mktemp("sums")
    port = free_port()
    place = {"WORLD_SIZE": str(SIZE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", WORKER, work], env=os.environ | place | {"RANK": str(rank)})
        for rank in range(SIZE)
    ]
    assert [process.wait(100) for process in processes] == [0] * SIZE
    return [torch.load(work / f"{rank}.pt", weights_only=True) for rank in range(SIZE)]


@pytest.mark.parametrize("kind", ["reduced", "shared", "averaged"])
def test_all_replicas_end_with_the_same_bits(found, kind):
    for other in found[1:]:
        for name, mine in found[0][kind].items():
            assert torch.equal(mine, other[kind][name]), name


def test_it_makes_no_difference_where_gradients_are_summed(found):
    for name, mine in found[0]["shared"].items():
        torch.testing.assert_close(mine, found[0]["reduced"][name])


def test_where_one_has_no_room_none_shares(found):
    assert [own["without_room"] for own in found] == [True] * SIZE


def test_replicas_are_apart_between_meetings(found):
    assert not torch.equal(found[0]["apart"]["turned"], found[1]["apart"]["turned"])


def test_what_no_replica_has_a_gradient_for_is_left_alone(found):
    """AdamW would shrink it by its weight decay."""
    torch.manual_seed(0)
    for shape in [(5, 3), (4, 6)]:
        torch.randn(shape)
    torch.randn(7, dtype=torch.bfloat16)
    assert torch.equal(found[0]["reduced"]["unused"], torch.randn(3))


def test_tensors_beside_the_training_are_summed(found):
    for own in found:
        assert torch.equal(own["sums"][0], torch.full((2,), 3.0))
        assert int(own["sums"][1]) == 3
