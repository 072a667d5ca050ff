"""What clients of a run that averages its ends train on, and the reference they are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.central import Central, count_targets
from client_ends.train import prepare_ends
from server_trunk.server import load_run_trunk
from splitfl.adapters import named_trainables
from splitfl.config import LoraSettings
from splitfl.optimizer import build_optimizer
from splitfl.parts.loading import attach_trunk, load_ends
from tests.integration.test_equality import WEIGHTS, fraction_of
from tests.trainer import ENDS, Batch, Trainer, snapshot
from tests.world import World, side_by_side


def batch(client: int, step: int) -> Batch:
    """Of unequal size for every client and step."""
    rows, length = 1 + (client + step) % 3, 6 + 3 * client
    ids = torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(100 * client + step))
    return {"input_ids": ids, "labels": ids.clone()}


def batches_of(clients: int, steps: int) -> list[list[Batch]]:
    """By step and client."""
    return [[batch(client, step) for client in range(clients)] for step in range(steps)]


class Reference:
    """One trunk and N sets of ends in one process. ``batch(client, step)``: what they train on."""

    def __init__(self, world: Any, ends: str = "lora", batch: Callable[[int, int], Batch] = batch) -> None:
        config, self._batch = world.config, batch
        self.rounds = config.round_steps
        self.trunk = load_run_trunk(config, torch.device("cpu"))
        parts = [prepare_ends(load_ends(world.model, config.cut), ends, LoraSettings(), seed=0) for _ in world.keys]
        self.start = snapshot(self.trunk)
        self.ends_start = snapshot(parts[0])
        self.central = Central(self.trunk, parts, config.optimizer, ENDS)
        self.ends, self.sides = self.central.ends, self.central._ends_sides
        self.counted = [0] * len(parts)
        self.newest: dict[str, torch.Tensor] | None = None

    def step(self, number: int, clients: list[int]) -> list[float]:
        self.central.ends = [self.ends[client] for client in clients]
        self.central._ends_sides = [self.sides[client] for client in clients]
        batches = [self._batch(client, number) for client in clients]
        losses = self.central.step(batches)
        for client, one in zip(clients, batches, strict=True):
            self.counted[client] += count_targets(one)
        return losses

    def average(self, members: list[int], given: list[int]) -> None:
        """The round: ``members`` are averaged, ``given`` get the result."""
        total = sum(self.counted[client] for client in members)
        sets = {client: dict(named_trainables(self.ends[client])) for client in {*members, *given}}
        self.newest = {
            name: sum(sets[client][name].detach().double() * (self.counted[client] / total) for client in members).float()
            for name in sets[members[0]]
        }
        self.counted = [0] * len(self.counted)
        for client in given:
            self.give(client)

    def give(self, client: int) -> None:
        assert self.newest is not None
        with torch.no_grad():
            for name, parameter in named_trainables(self.ends[client]).items():
                parameter.copy_(self.newest[name])

    def begin_anew(self, client: int) -> None:
        """The client is a new process: its ends begin from the average, its optimizer from nothing."""
        self.give(client)
        self.counted[client] = 0
        self.sides[client].optimizer = build_optimizer(self.sides[client].parameters, ENDS)


def average_trunks(trunks: Sequence[Any], weights: Sequence[int]) -> None:
    """All trunks become their weighted mean."""
    held, total = [named_trainables(trunk) for trunk in trunks], sum(weights)
    with torch.no_grad():
        for name in held[0]:
            mean = sum(own[name].double() * (weight / total) for weight, own in zip(weights, held, strict=True)).float()
            for own in held:
                own[name].copy_(mean)


class Federated(Reference):
    """A trunk for each replica, averaged after every K steps, weighted by the target tokens that each has counted since.
    ``seats(step)``: the clients of each replica in a step.
    """

    def __init__(self, world: Any, seats: Callable[[int], list[list[int]]], batch: Callable[[int, int], Batch] = batch) -> None:
        super().__init__(world, batch=batch)
        self._seats, self._every = seats, world.config.local_steps
        others = [load_run_trunk(world.config, torch.device("cpu")) for _ in seats(0)[1:]]
        self._centrals = [self.central, *(Central(trunk, [], world.config.optimizer, ENDS) for trunk in others)]
        self._weights = [0] * len(self._centrals)

    def step(self, number: int, clients: list[int]) -> list[float]:
        losses: dict[int, float] = {}
        for replica, (central, seated) in enumerate(zip(self._centrals, self._seats(number), strict=True)):
            for client in seated:
                attach_trunk(self.ends[client], central.trunk)
            before, self.central = sum(self.counted), central
            losses |= dict(zip(seated, super().step(number, seated), strict=True))
            self._weights[replica] += sum(self.counted) - before
        if (number + 1) % self._every == 0:
            average_trunks([central.trunk for central in self._centrals], self._weights)
            self._weights = [0] * len(self._centrals)
        return [losses[client] for client in clients]


def assert_equals(reference: Reference, world: World, weights: dict[int, dict[str, torch.Tensor]]) -> None:
    assert fraction_of(snapshot(world.server._model), snapshot(reference.trunk), reference.start) <= WEIGHTS
    for client, mine in weights.items():
        theirs = snapshot(reference.ends[client])
        assert fraction_of(mine, theirs, reference.ends_start) <= WEIGHTS
        assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) <= 1e-5


class Halted:
    """Sends the first ``count`` parts of a trainer's next upload, and the others when told."""

    def __init__(self, trainer: Trainer, count: int) -> None:
        self._rounds, self._count = trainer.split.trunk.session.rounds, count
        self._upload, self._rest = self._rounds._upload, []
        self._rounds._upload = self._halt

    def _halt(self, number: int, send: Callable[[Any, memoryview], None]) -> None:
        parts: list[tuple[Any, memoryview]] = []
        self._upload(number, lambda part, view: parts.append((part, view)))
        for part, view in parts[: self._count]:
            send(part, view)
        self._rest, self._send = parts[self._count :], send

    def release(self) -> None:
        for part, view in self._rest:
            self._send(part, view)
        self._rounds._upload = self._upload


def all_step(trainers: dict[int, Trainer], number: int) -> list[float]:
    clients = list(trainers)
    return side_by_side(len(clients), lambda index: trainers[clients[index]].step(batch(clients[index], number)))
