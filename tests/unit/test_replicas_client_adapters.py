"""Which replica keeps an adapter that lies on several, and what is found where its client goes."""

from __future__ import annotations

import pytest
import torch

from server_trunk.adapter_book import AdapterBook
from server_trunk.replicas.client_adapters import SpreadTraining
from splitfl.checkpoint import checkpoint_directory, client_directory, save_checkpoint
from splitfl.config import build_config
from splitfl.errors import CheckpointError, Refused
from splitfl.parts.loading import load_trunk
from tests.unit.test_server_client_adapters import BASE, join, model

__all__ = ["model"]


class Desk:
    """One replica's adapters; what the others say is put into ``others``."""

    def __init__(self, rank, model, out):
        self.rank = rank
        config = build_config({"model": model, "mode": "hierarchical", "replicas": 2, "out": str(out)} | BASE)
        self.book = AdapterBook(config)
        self.training = SpreadTraining(load_trunk(model, "1:1"), config, self.book, self)
        self.said, self.others = None, {}

    def exchange(self, value):
        self.said = value
        return [value if rank == self.rank else self.others.get(rank, {}) for rank in range(2)]

    def step(self, number, client="anna"):
        for parameter in self.training.parameters_of([client]):
            parameter.grad = torch.ones_like(parameter)
        self.training.close(number, {client: 1})

    def keep(self, out, client="anna"):
        tensors, extra, plain = self.training.state_of(client)
        step = self.training.adapters[client].step
        save_checkpoint(checkpoint_directory(client_directory(out, client), step), tensors, {"step": step} | plain, extra)


def meet(*desks):
    for _ in range(2):  # each has to know what the other will say
        for desk in desks:
            desk.others = {other.rank: other.said or {} for other in desks if other is not desk}
            desk.training.share()


def weights(desk, client="anna"):
    return {name: parameter.detach().clone() for name, parameter in desk.training.adapters[client].parameters.items()}


def test_an_adapter_goes_with_its_client_there_and_back(tmp_path, model):
    here, there = Desk(0, model, tmp_path), Desk(1, model, tmp_path)
    join(here.training, here.book, "anna", rank=3, learning_rate=0.01)
    here.step(4)
    meet(here, there)
    assert here.training.elsewhere == {}
    assert there.training.elsewhere == {"anna": 4}
    here.keep(tmp_path)
    with pytest.raises(Refused, match="has rank 3"):
        there.book.agree("anna", {"rank": 4})
    join(there.training, there.book, "anna")
    assert there.training.adapters["anna"].made == 1
    assert there.book.of("anna").learning_rate == 0.01
    for name, weight in weights(here).items():
        assert torch.equal(weights(there)[name], weight)
    there.step(5)
    meet(here, there)
    assert here.training.elsewhere == {"anna": 5}
    assert there.training.elsewhere == {}
    there.keep(tmp_path)
    before = here.training.adapters["anna"]
    join(here.training, here.book, "anna", learning_rate=0.005)
    assert here.training.adapters["anna"] is not before
    assert here.book.of("anna").learning_rate == 0.005
    for name, weight in weights(there).items():
        assert torch.equal(weights(here)[name], weight)
    # Both have it as it was kept: one of them is to keep it.
    meet(here, there)
    assert ("anna" in here.training.elsewhere) != ("anna" in there.training.elsewhere)


def test_an_adapter_that_cannot_be_read_is_not_made_anew(tmp_path, model):
    desk = Desk(0, model, tmp_path)
    desk.training.elsewhere = {"anna": 3}
    with pytest.raises(CheckpointError):
        join(desk.training, desk.book, "anna")
    assert "anna" not in desk.training.adapters
