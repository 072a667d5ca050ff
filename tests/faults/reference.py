"""What a run under ``on_loss = "drop"`` should have come to: trained in one process on what the run's ledger says counted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.central import count_targets
from client_ends.data import Batches, pad_token
from client_ends.settings import TrainSettings
from client_ends.train import prepare_ends, read_data
from server_trunk.server import load_run_trunk
from splitfl.adapters import named_trainables
from splitfl.config import LoraSettings, OptimizerSettings, RunConfig, build_config, read_toml
from splitfl.optimizer import build_optimizer
from splitfl.parts.loading import attach_trunk, load_ends

__all__ = ["reference"]


class _Side:
    """Weights and the optimizer that moves them."""

    def __init__(self, model: torch.nn.Module, settings: OptimizerSettings) -> None:
        self.named = named_trainables(model)
        self.parameters = list(self.named.values())
        self._optimizer, self._clip = build_optimizer(self.parameters, settings), settings.clip

    def move(self, gradients: list[Any]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(self.parameters, self._clip)
        self._optimizer.step()


def reference(work: Path, texts: list[Path], ledger: list[tuple[int, dict[str, int]]]) -> dict[str, dict[str, torch.Tensor]]:
    """``server``, ``ends0``, ``ends1``: weights after the steps of ``ledger``. The diaries in ``work`` say which batch it was."""
    config = build_config(read_toml(work / "server" / "config.toml"))
    trunk = load_run_trunk(config, torch.device("cpu")).train()
    ends = [
        prepare_ends(load_ends(config.model, config.cut, dtype=torch.float32), "full", LoraSettings(), seed=0).train()
        for _ in texts
    ]
    for end in ends:
        attach_trunk(end, trunk)
    shared, sides = _Side(trunk, config.optimizer), [_Side(end, config.optimizer) for end in ends]
    clients = [_Client(work / f"diary{index}", config, text, index) for index, text in enumerate(texts)]
    for step, counted in ledger:
        total: list[Any] = [None] * len(shared.parameters)
        moves = []
        for index, client in enumerate(clients):
            given, makes = counted.get(f"client{index}", 0), step in client.made
            if not given and not makes:
                continue
            batch = client.batch(client.sent[step])
            targets = count_targets(batch)
            assert given in (0, targets), "one micro-batch counts whole or not at all"
            side = sides[index]
            loss = ends[index](**batch).loss
            gradients = torch.autograd.grad(loss, side.parameters + shared.parameters)
            if makes:
                assert client.made[step] == client.sent[step]
                moves.append((side, list(gradients[: len(side.parameters)])))
            if given:
                weighted = [one * (targets / sum(counted.values())) for one in gradients[len(side.parameters) :]]
                total = [new if old is None else old + new for old, new in zip(total, weighted, strict=True)]
        for side, own in moves:
            side.move(own)
        if any(counted.values()):
            shared.move(total)
    return {"server": _weights(shared), "ends0": _weights(sides[0]), "ends1": _weights(sides[1])}


def _weights(side: _Side) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in side.named.items()}


class _Client:
    """``sent``: the number of the batch whose gradient was sent in a step; ``made``: the same of the steps that the ends have
    made, in the history that they stand in at the end.
    """

    def __init__(self, diary: Path, config: RunConfig, text: Path, index: int) -> None:
        self.sent: dict[int, int] = {}
        self.made: dict[int, int] = {}
        for entry in map(json.loads, diary.read_text().splitlines()):
            if "sent" in entry:
                self.sent[entry["sent"]] = entry["batch"]
            elif "made" in entry:
                self.made[entry["made"]] = entry["batch"]
            else:
                self._stand(entry["stands"])
        tokenizer = AutoTokenizer.from_pretrained(config.model)
        settings = TrainSettings(trunk="", identity="", data=str(text), max_length=32, batch_size=2, evaluate=0, seed=index)
        rows, _ = read_data(settings, tokenizer)
        self._draw: Iterator[Any] = iter(Batches(rows, 2, seed=index, pad_token_id=pad_token(tokenizer)))
        self._drawn: list[Any] = []

    def _stand(self, step: int) -> None:
        """The ends are as they were after ``step``; killed as it said that it had made it, a process says no more."""
        self.made = {number: batch for number, batch in self.made.items() if number <= step}
        if step in self.sent:
            self.made[step] = self.sent[step]

    def batch(self, number: int) -> Any:
        while len(self._drawn) <= number:
            self._drawn.append(next(self._draw))
        return self._drawn[number]
