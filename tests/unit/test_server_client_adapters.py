"""Whose adapter steps, by how much, and what a client may have agreed upon."""

from __future__ import annotations

import math

import pytest
import torch

from server_trunk.adapter_book import AdapterBook, AdapterSettings
from server_trunk.client_adapters import ClientTraining
from splitfl.checkpoint import client_directory, clients_of, prune_client_checkpoints, save_checkpoint
from splitfl.config import build_config
from splitfl.errors import CheckpointError, KeyFileError, Refused
from splitfl.packed_state import pack_state, unpack_state
from splitfl.parts.loading import load_trunk
from splitfl.protocol.keys import Identity, parse_line
from tests.world import tiny_llama

BASE = {
    "adapters": "per-client",
    "optimizer.learning_rate": 0.004,
    "optimizer.clip": 1.0,
    "lora.rank": 2,
    "lora.targets": "q_proj",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


def training(model, **settings):
    config = build_config({"model": model} | BASE | settings)
    book = AdapterBook(config)
    return ClientTraining(load_trunk(model, "1:1"), config, book), book


def join(made, book, client, **asked):
    book.settle(f"session of {client}", client, asked)
    made.joined(client)


def give(made, client, value):
    """Gradients of a norm of ``value`` in all."""
    parameters = made.parameters_of([client])
    count = sum(parameter.numel() for parameter in parameters)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, value / math.sqrt(count))


def weights(made, client):
    return [parameter.detach().clone() for parameter in made.parameters_of([client])]


def moved(before, after):
    return max(float((new - old).abs().max()) for old, new in zip(before, after, strict=True))


def test_only_who_contributed_steps_each_by_its_own_rate_and_its_own_clip(model):
    made, book = training(model)
    for client, rate in (("ada", 0.001), ("ben", 0.004), ("cleo", 0.002)):
        join(made, book, client, learning_rate=rate)
    before = {client: weights(made, client) for client in made.adapters}
    give(made, "ada", 30.0)
    give(made, "ben", 5000.0)
    report = made.close(7, {"ada": 10, "ben": 100, "cleo": 0})
    # Adam's first step is of the learning rate's own size, whatever the gradient.
    assert moved(before["ada"], weights(made, "ada")) == pytest.approx(0.001, rel=1e-3)
    assert moved(before["ben"], weights(made, "ben")) == pytest.approx(0.004, rel=1e-3)
    assert moved(before["cleo"], weights(made, "cleo")) == 0
    assert report.of("ada").grad_norm == pytest.approx(3.0)
    assert report.of("ben").grad_norm == pytest.approx(50.0)
    assert (report.of("ada").learning_rate, report.of("ben").learning_rate) == (0.001, 0.004)
    assert report.of("cleo").skipped
    assert not report.skipped
    # Clipped by itself: the sum's norm was 30, of which 1/30 was left.
    first = next(iter(made.adapters["ada"].optimizer.state.values()))
    count = sum(parameter.numel() for parameter in made.parameters_of(["ada"]))
    assert float(first["exp_avg"].flatten()[0]) == pytest.approx(0.1 / math.sqrt(count), rel=1e-4)
    assert [made.adapters[client].step for client in ("ada", "ben", "cleo")] == [7, 7, -1]
    assert all(parameter.grad is None for client in made.adapters for parameter in made.parameters_of([client]))


def test_a_gradient_that_is_not_finite_costs_its_own_client_the_step_and_nobody_else(model):
    made, book = training(model)
    for client in ("ada", "ben"):
        join(made, book, client)
        give(made, client, 1.0)
    made.parameters_of(["ada"])[0].grad[0, 0] = math.inf
    before = {client: weights(made, client) for client in made.adapters}
    report = made.close(0, {"ada": 4, "ben": 4})
    assert report.of("ada").skipped
    assert report.of("ada").grad_norm is None
    assert moved(before["ada"], weights(made, "ada")) == 0
    assert moved(before["ben"], weights(made, "ben")) > 0


def test_the_schedule_runs_over_the_steps_an_adapter_has_made(model):
    made, book = training(model, **{"optimizer.schedule": "linear", "optimizer.steps": 10})
    join(made, book, "ada")
    rates = []
    for step in range(3):
        give(made, "ada", 1.0)
        rates.append(made.close(step, {"ada": 1}).of("ada").learning_rate)
    join(made, book, "late")
    give(made, "late", 1.0)
    assert rates == pytest.approx([0.004, 0.0036, 0.0032])
    assert made.close(3, {"late": 1}).of("late").learning_rate == pytest.approx(0.004)


def test_who_comes_back_goes_on_with_another_rate_where_it_asks_for_one(model):
    made, book = training(model)
    join(made, book, "ada", rank=3, weight_decay=0.5)
    give(made, "ada", 1.0)
    made.close(0, {"ada": 1})
    kept = weights(made, "ada")
    book.left("session of ada")
    join(made, book, "ada", learning_rate=0.002)
    assert all(map(torch.equal, weights(made, "ada"), kept))
    assert book.plain("ada") == {"rank": 3, "alpha": 16.0, "learning_rate": 0.002, "weight_decay": 0.5}
    give(made, "ada", 1.0)
    assert made.close(1, {"ada": 1}).of("ada").learning_rate == 0.002
    group = made.adapters["ada"].optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.002, 0.5)
    with pytest.raises(Refused, match="rank 3 and alpha 16, and keeps them"):
        book.agree("ada", {"rank": 4})


def test_the_least_that_may_be_asked_for():
    book = AdapterBook(build_config({"model": "m"} | BASE))
    least = {"rank": 1, "learning_rate": 0, "weight_decay": 0}
    assert book.agree("ada", least) == AdapterSettings(1, 16.0, 0.0, 0.0)
    for name, value in (("rank", 0), ("alpha", 0), ("learning_rate", -1e-9), ("weight_decay", -1e-9)):
        with pytest.raises(Refused, match=f"the adapter's {name.replace('_', ' ')} is"):
            book.agree("ada", {name: value})


def test_one_adapters_state_comes_back_whole(model):
    made, book = training(model)
    join(made, book, "ada", rank=3, learning_rate=0.001)
    give(made, "ada", 1.0)
    made.close(4, {"ada": 1})
    tensors, extra, plain = made.state_of("ada")
    other, others_book = training(model)
    other.recall("ada", plain)
    other.load_client("ada", tensors, unpack_state(pack_state(extra)), plain, 4)
    for each in (made, other):
        give(each, "ada", 2.0)
        each.close(5, {"ada": 1})
    assert all(map(torch.equal, weights(made, "ada"), weights(other, "ada")))
    assert others_book.of("ada") == book.of("ada")
    assert (other.adapters["ada"].made, other.adapters["ada"].step) == (2, 5)


def test_clients_checkpoints_go_when_no_checkpoint_of_the_run_names_them(tmp_path):
    for step, named in ((3, {"ada": 2}), (4, {"ada": 2, "ben": 4})):
        save_checkpoint(tmp_path / "checkpoints" / f"step-{step:08d}", {}, {"clients": named})
    for client, step in (("ada", 1), ("ada", 2), ("ben", 3), ("ben", 4)):
        save_checkpoint(client_directory(tmp_path, client) / "checkpoints" / f"step-{step:08d}", {}, {})
    (tmp_path / "clients" / "ada" / "checkpoints" / ".step-00000005.1234.tmp").mkdir()  # an interrupted write
    prune_client_checkpoints(tmp_path)
    left = {(path.parent.parent.name, path.name) for path in (tmp_path / "clients").glob("*/checkpoints/*")}
    assert left == {("ada", "step-00000002"), ("ben", "step-00000004")}
    assert clients_of(tmp_path) == ["ada", "ben"]
    assert clients_of(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("name", [".", "..", "...", "a/b", "", "x" * 65])
def test_names_that_are_no_directories_are_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="no client is called"):
        client_directory(tmp_path, name)
    with pytest.raises(KeyFileError):
        parse_line(f"{Identity.generate().public} {name}")
