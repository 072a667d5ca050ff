"""The numbers of a real run: what the meter says against what the clients know themselves."""

from __future__ import annotations

import json
import urllib.request

import pytest
import torch

from splitfl.commands.top import _Log
from splitfl.errors import ConfigError
from tests.unit.channel_world import wait_until
from tests.world import World, running, side_by_side, tiny_llama

STEPS, ROWS, LENGTH = 3, 2, 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


def train(world: World, client: int) -> tuple[int, int]:
    """Three steps; returns the bytes this client sent and received."""
    split = world.join_as(client).train()
    ids = torch.randint(3, 60, (ROWS, LENGTH), generator=torch.Generator().manual_seed(client))
    for _ in range(STEPS):
        split(input_ids=ids, labels=ids).loss.backward()
        split.step()
    split.wait_step()
    split.close()
    return split.trunk.session.bytes_sent, split.trunk.session.bytes_received


@pytest.mark.parametrize("memory", [True, False])
def test_the_meter_counts_what_the_clients_sent_and_got(tmp_path, model, memory):
    with running(World(tmp_path, model, 2, memory=memory, status_every=3600.0)) as world:
        carried = side_by_side(2, lambda client: train(world, client))
        wait_until(lambda: len(world.events("left")) == 2)  # the server notes a goodbye after it has answered it
    taken = world.server.meter.snapshot()
    for client, (sent, received) in enumerate(carried):
        counted = taken["clients"][f"client{client}"]
        assert (counted["steps"], counted["forwards"], counted["backwards"]) == (STEPS, STEPS, STEPS)
        assert counted["tokens"] == counted["backward_tokens"] == STEPS * ROWS * LENGTH
        assert counted["targets"] == STEPS * ROWS * (LENGTH - 1)
        assert counted["bytes_received"] == sent
        assert counted["bytes_sent"] == received
        assert 0 <= counted["queue"]["median"] <= counted["queue"]["p95"]
    assert taken["steps"] == STEPS
    assert taken["sessions"] == taken["waiting_tokens"] == taken["graph_tokens"] == 0
    assert 0 < taken["busy_seconds"] < taken["seconds"]
    assert 1 <= taken["members"] <= 2


def test_log_top_and_endpoint_show_the_same_run(tmp_path, model):
    with running(World(tmp_path, model, 1, metrics="0", status_every=3600.0)) as world:
        (url,) = (event["url"] for event in world.events("metrics"))
        train(world, 0)
        with urllib.request.urlopen(url, timeout=5) as answer:
            metrics = answer.read().decode()
    assert f'splitfl_tokens_total{{client="client0",direction="forward"}} {float(STEPS * ROWS * LENGTH)}' in metrics
    assert f"splitfl_steps_total {float(STEPS)}" in metrics
    (status,) = world.events("status")  # the last one, which the end of the run writes
    assert status["steps"] == STEPS
    shown, note = _Log(tmp_path / "server").read()
    assert shown == status
    assert note == "stopped: the server is stopping"
    json.dumps(status)


def test_an_address_in_use_is_one_sentence_before_anybody_joins(tmp_path, model):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with running(World(tmp_path / "one", model, 1, metrics="0")) as world:
        port = world.events("metrics")[0]["url"].rpartition(":")[2].split("/")[0]
        other = World(tmp_path / "two", model, 1, metrics=port).server
        with pytest.raises(ConfigError, match=f"cannot serve metrics at {port}: address already in use"):
            other.start()
    assert other.join is None
