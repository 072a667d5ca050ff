"""A server that starts again goes on where the run stood, with every client's adapter."""

from __future__ import annotations

import dataclasses
import errno

import pytest
import torch

import splitfl.checkpoint
from server_trunk.run_ledger import RunLedger
from server_trunk.server import TrunkServer
from splitfl.checkpoint import (
    checkpoint_directory,
    checkpoint_steps,
    client_directory,
    clients_of,
    load_checkpoint,
    newest_checkpoint,
)
from splitfl.cli import main
from splitfl.config import LoraSettings
from splitfl.errors import CheckpointError, ConfigError, NotReadable
from splitfl.packed_state import unpack_state
from splitfl.transport.memory import MemoryNetwork, MemoryServerTransport
from tests.integration.test_client_adapters import SETTINGS, train, weights
from tests.integration.test_equality import story_batches
from tests.world import World, running, side_by_side, tiny_llama


def again(world, **changes):
    """A new server for the run of ``world``, whose own ends."""
    world.server.stop()
    network = MemoryNetwork()
    config = dataclasses.replace(world.server.config, **changes)
    server = TrunkServer(config, resume=True, transport=MemoryServerTransport(network, world.server.identity))
    world.network, world.server = network, server
    return world


def test_resumed_is_as_uninterrupted_and_absent_clients_keep_theirs(tmp_path, data, stories):
    steps = story_batches(data, 3, steps=12)
    own = [[step[client] for step in steps] for client in range(3)]
    settings = SETTINGS | {"lora.dropout": 0.1}
    frozen = {"ends": "frozen"}
    reference = []
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        world = World(tmp_path / name, stories, 3, **settings)
        with running(world):
            side_by_side(3, lambda client, world=world: train(world, client, own[client][:4], **frozen))
            if name == "whole":
                reference = [train(world, 0, own[0][4:8], **frozen), train(world, 1, own[1][4:8], **frozen)]
                expected = [weights(world, client) for client in range(3)]
    assert checkpoint_steps(world.server.config.out_dir) == [3]
    with pytest.raises(ConfigError, match="--resume"):
        TrunkServer(world.server.config)
    with running(again(world, clients=1)):
        assert world.events("resumed")[-1]["step"] == 3
        found = [train(world, 0, own[0][4:8], **frozen)]
    assert world.events("step")[-1]["step"] == 7
    assert clients_of(world.server.config.out_dir) == ["client0", "client1", "client2"]
    with running(again(world, clients=1)):
        found.append(train(world, 1, own[1][4:8], asked={}, **frozen))
    assert found == reference
    for client in range(3):
        assert all(torch.equal(mine, expected[client][name]) for name, mine in weights(world, client).items())
    # Who was not there for eight steps has one checkpoint, of the step it was part of last.
    folder = client_directory(world.server.config.out_dir, "client2")
    assert checkpoint_steps(folder) == [3]


@pytest.mark.parametrize("trainables", ["lora", "full"])
def test_a_shared_trunk_resumes_as_well(tmp_path, data, stories, trainables):
    batches = [step[0] for step in story_batches(data, 1, steps=8)]
    settings = {"trainables": trainables, "optimizer.learning_rate": 1e-3, "optimizer.schedule": "linear", "optimizer.steps": 9}
    found = []
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        world = World(tmp_path / name, stories, 1, **settings)
        with running(world):
            losses = train(world, 0, batches[: 8 if name == "whole" else 5], ends="frozen", asked={})
        if name == "parts":
            with running(again(world)):
                losses += train(world, 0, batches[5:], ends="frozen", asked={})
        found.append(losses)
    assert found[0] == found[1]
    assert [event["step"] for event in world.events("step")] == list(range(8))


def test_a_damaged_checkpoint_is_passed_over_and_another_runs_is_refused(tmp_path):
    model = tiny_llama(tmp_path / "model")
    world = World(tmp_path, model, 1, checkpoint_every=1, **SETTINGS)
    batch = {"input_ids": torch.arange(12)[None], "labels": torch.arange(12)[None]}
    with pytest.raises(CheckpointError, match="leave --resume out"):
        again(world)
    with running(world):
        train(world, 0, [batch] * 3)
    run = world.server.config.out_dir
    assert checkpoint_steps(run) == checkpoint_steps(client_directory(run, "client0")) == [0, 1, 2]
    damaged = checkpoint_directory(client_directory(run, "client0"), 2) / "trainables.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    again(world)
    assert world.events("resumed")[-1]["step"] == 1
    assert world.events("checkpoint-damaged")[-1]["step"] == 2
    assert checkpoint_steps(run) == [0, 1]
    assert (run / "checkpoints" / "damaged-step-00000002").is_dir()
    for changes, mend in (
        ({"adapters": "shared"}, "adapters = per-client"),
        ({"cut": "1:2"}, "cut = 1:1"),
        ({"lora": LoraSettings(dropout=0.5)}, "lora"),
        ({"model": tiny_llama(tmp_path / "other", seed=1)}, "another model"),
    ):
        with pytest.raises(CheckpointError, match=mend):
            again(world, **changes)
    assert checkpoint_steps(run) == [0, 1], "what is of another run is not damaged"
    assert 'adapters = "per-client"' in (run / "config.toml").read_text()


def test_a_checkpoint_of_a_later_format_stays_where_it_is(tmp_path):
    model = tiny_llama(tmp_path / "model")
    world = World(tmp_path, model, 1, checkpoint_every=1)
    batch = {"input_ids": torch.arange(12)[None], "labels": torch.arange(12)[None]}
    with running(world):
        train(world, 0, [batch] * 2, asked={})
    run = world.server.config.out_dir
    description = checkpoint_directory(run, 1) / "checkpoint.json"
    description.write_text(description.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(NotReadable, match=r"step-00000001 has format 2.* use the splitfl version that wrote it"):
        again(world)
    assert checkpoint_steps(run) == [0, 1]


def test_where_the_disk_does_not_give_a_checkpoint_back_the_one_before_is_used(tmp_path, monkeypatch):
    model = tiny_llama(tmp_path / "model")
    world = World(tmp_path, model, 1, checkpoint_every=1)
    batch = {"input_ids": torch.arange(12)[None], "labels": torch.arange(12)[None]}
    with running(world):
        train(world, 0, [batch] * 2, asked={})
    digest = splitfl.checkpoint.file_digest

    def lost(file):
        if "step-00000001" in str(file):
            raise OSError(errno.EIO, "Input/output error")
        return digest(file)

    monkeypatch.setattr(splitfl.checkpoint, "file_digest", lost)
    again(world)
    assert world.events("resumed")[-1]["step"] == 0
    assert "Input/output error" in world.events("checkpoint-damaged")[-1]["error"]


def test_a_damaged_older_checkpoint_does_not_end_the_running_server(tmp_path):
    world = World(tmp_path, tiny_llama(tmp_path / "model"), 1, checkpoint_every=1, **SETTINGS)
    batch = {"input_ids": torch.arange(12)[None], "labels": torch.arange(12)[None]}
    with running(world):
        train(world, 0, [batch] * 2)
        (checkpoint_directory(world.server.config.out_dir, 0) / "checkpoint.json").write_text("{")
        train(world, 0, [batch] * 2)
        assert world.server._loop.failure is None
    assert [event["step"] for event in world.events("checkpoint")] == [0, 1, 2, 3]


def test_the_command_says_what_to_do_where_there_is_nothing_to_go_on_from(tmp_path, capsys):
    model = tiny_llama(tmp_path / "model")
    (tmp_path / "authorized_clients").write_text("")
    arguments = ["serve", model, "--out", str(tmp_path / "run"), "--authorized-clients", str(tmp_path / "authorized_clients")]
    assert main([*arguments, "--resume"]) == 2
    assert "leave --resume out to begin a new run" in capsys.readouterr().err


def test_a_server_that_is_started_again_by_something_goes_on_where_it_can(tmp_path, capsys, monkeypatch):
    def set_up(server, shards, resume, echo):
        raise ConfigError(f"resume: {resume}")

    monkeypatch.setattr(TrunkServer, "_set_up", set_up)
    (tmp_path / "authorized_clients").write_text("")
    arguments = ["serve", "model", "--out", str(tmp_path), "--resume-if-any"]
    assert main(arguments) == 2
    assert "resume: False" in capsys.readouterr().err
    (checkpoint := tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    (checkpoint / "checkpoint.json").touch()
    assert main(arguments) == 2
    assert "resume: True" in capsys.readouterr().err


def test_the_ledger_of_a_checkpoint_says_each_step_once_across_resumes(tmp_path):
    world = World(tmp_path, tiny_llama(tmp_path / "model"), 1, checkpoint_every=2, trainables="full")
    batch = {"input_ids": torch.arange(12)[None], "labels": torch.arange(12)[None]}
    with running(world):
        train(world, 0, [batch] * 3, asked={})
    with running(again(world)):
        train(world, 0, [batch] * 2, asked={})
    newest = load_checkpoint(newest_checkpoint(world.server.config.out_dir))
    entries = RunLedger.from_state(unpack_state(newest[2]["ledger"])).entries()
    assert entries == [(step, {"client0": 11}) for step in range(5)]
