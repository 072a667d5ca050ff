"""A client's training as a user writes it: a plain PyTorch loop over a model whose trunk is elsewhere."""

from __future__ import annotations

from typing import Any

import torch

from client_ends.train import prepare_ends
from splitfl.adapters import named_trainables
from splitfl.config import LoraSettings, OptimizerSettings
from splitfl.optimizer import build_optimizer
from tests.world import side_by_side

Batch = dict[str, torch.Tensor]

#: Adam divides by the root of a second moment; where a gradient is nearly nothing, its rounding error becomes a whole step.
#: With the usual epsilon of 1e-8, central training differs from itself, its batches padded by three more columns, by 4.7e-6 in
#: these runs: no bar below that could be held by anything. With 1e-6 it differs from itself by 7e-7, which leaves room to see a
#: mistake.
EPS = 1e-6
ENDS = OptimizerSettings(learning_rate=1e-3, eps=EPS)


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in named_trainables(model).items()}


class Trainer:
    """One client, one step at a time. ``server``: whatever a client joins by ``join_as``."""

    def __init__(self, server: Any, client: int, ends: str = "lora", **options: Any) -> None:
        self.split = server.join_as(client, **options)
        self.model = prepare_ends(self.split, ends, LoraSettings(), seed=0).train()
        self._parameters = list(named_trainables(self.model).values())
        self.optimizer = build_optimizer(self._parameters, ENDS) if self._parameters else None

    def step(self, batch: Batch) -> float:
        loss = self.model(**batch).loss
        loss.backward()
        if self.optimizer is None:
            self.split.step()
        else:
            torch.nn.utils.clip_grad_norm_(self._parameters, ENDS.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return float(loss.detach())

    def end(self) -> None:
        self.split.wait_step()
        self.split.close()

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return snapshot(self.model)


def train_all(
    server: Any, batches: list[list[Batch]], ends: str = "lora", **options: Any
) -> tuple[list[list[float]], list[dict[str, torch.Tensor]]]:
    """All clients of a running server, a thread each. ``batches`` and the losses: by step, by client; then each client's ends."""

    def client(index: int) -> tuple[list[float], dict[str, torch.Tensor]]:
        trainer = Trainer(server, index, ends, **options)
        losses = [trainer.step(step[index]) for step in batches]
        trainer.end()
        return losses, trainer.weights

    results = side_by_side(len(server.keys), client)
    return [list(step) for step in zip(*(losses for losses, _ in results), strict=True)], [weights for _, weights in results]
