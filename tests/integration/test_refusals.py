"""Who is not let in, and what does not start: each is told why, before anything is written or loaded."""

from __future__ import annotations

import dataclasses
import functools
import json
import socket
import threading

import pytest
import torch

from server_trunk.run_lock import RunLock
from server_trunk.server import TrunkServer
from splitfl.checkpoint import checkpoint_directory, save_checkpoint
from splitfl.config import build_config
from splitfl.errors import ConfigError, ConnectError, ModelError, Refused
from splitfl.protocol.keys import write_identity
from splitfl.runlog import RunLog
from tests.world import World, running, set_aside, tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


def test_a_run_is_never_written_over(tmp_path, model):
    world = World(tmp_path, model, 1, checkpoint_every=1)
    with running(world):
        split = world.join_as(0).train()
        ids = torch.ones(1, 8, dtype=torch.long)
        split(input_ids=ids, labels=ids).loss.backward()
        split.step()
        split.wait_step()
        split.close()
    with pytest.raises(ConfigError, match="earlier run"):
        TrunkServer(world.server.config)


def test_what_a_crash_left_is_mended_by_whoever_holds_the_run_s_lock(tmp_path, monkeypatch):
    (listed := tmp_path / "clients").write_text("")
    config = build_config({"model": "none", "out": str(tmp_path), "device": "cpu", "authorized_clients": str(listed)})
    checkpoint = checkpoint_directory(config.out_dir, 3)
    save_checkpoint(checkpoint, {}, {})
    set_aside(checkpoint)
    monkeypatch.setattr("server_trunk.server.RunLock", functools.partial(RunLock, patience=0.0))
    config.out_dir.mkdir(exist_ok=True)
    lock = RunLock(config.out_dir)
    with pytest.raises(ConfigError, match="another server keeps its run"):
        TrunkServer(config, resume_if_any=True)
    assert not checkpoint.exists(), "it may be that server's, under way"
    lock.release()
    with pytest.raises(ConfigError, match="earlier run"):
        TrunkServer(config)
    assert checkpoint.exists()
    RunLock(config.out_dir, patience=0.0).release()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"out": "/dev/null/run"}, "cannot write to"),
        ({"device": "cuda:7"}, "no cuda device"),
        ({"authorized_clients": "missing"}, "nobody could join"),
    ],
)
def test_a_server_that_cannot_start_says_why_and_leaves_nothing_behind(tmp_path, model, monkeypatch, settings, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clients").write_text("")
    values = {"model": model, "out": "out", "device": "cpu", "authorized_clients": "clients"} | settings
    with pytest.raises(ConfigError, match=words):
        TrunkServer(build_config(values))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("taken", ["bind", "metrics"])
def test_a_server_whose_address_is_taken_lets_another_have_the_run(tmp_path, model, monkeypatch, taken):
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        world = World(tmp_path, model, 1, memory=False, status_every=60.0, **{"bind": "127.0.0.1:0"} | {taken: address})
        threads = set(threading.enumerate())
        with pytest.raises(ConfigError, match="choose another"):
            world.server.start()
    assert set(threading.enumerate()) <= threads
    monkeypatch.setattr("server_trunk.server.RunLock", functools.partial(RunLock, patience=0.0))
    again = TrunkServer(dataclasses.replace(world.server.config, bind="127.0.0.1:0", metrics=""))
    world.server.stop()  # as whoever has started it may do
    again.start()
    again.stop()
    said = (world.server.config.out_dir / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in said][-2:] == ["serving", "stopped"]


def test_a_server_that_cannot_be_made_closes_its_log_and_lets_the_run_go(tmp_path, model, monkeypatch):
    logs = []

    class Kept(RunLog):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            logs.append(self)

    def broken(*_, **__):
        raise ModelError("no trunk (injected)")

    with monkeypatch.context() as patch:
        patch.setattr("server_trunk.server.RunLog", Kept)
        patch.setattr("server_trunk.server.Trunk", broken)
        with pytest.raises(ModelError):
            World(tmp_path, model, 1)
    assert [log._file for log in logs] == [None]
    RunLock(tmp_path / "server", patience=0.0).release()


def test_a_device_this_client_does_not_have(tmp_path, model):
    world = World(tmp_path, model, 1)
    with running(world), pytest.raises(ConfigError, match="no cuda device"):
        world.join_as(0, device="cuda:7")


@pytest.mark.parametrize("memory", [True, False])
def test_who_may_not_join_is_told_why(tmp_path, model, memory, tmp_path_factory):
    world = World(tmp_path, model, 1, memory=memory)
    other = tiny_llama(tmp_path_factory.mktemp("other"), seed=1)
    write_identity(tmp_path / "stranger.key")
    with running(world):
        join = world.join
        wrong_key = join.replace(str(world.server.identity.public), str(write_identity(tmp_path / "x.key").public))
        cases = [
            (ModelError, "float64", {"dtype": "float64"}),
            (Refused, "cut at 1:1", {"cut": "2:1"}),
            (Refused, "differ", {"model": other}),
            (Refused, "not 'elsewhere'", {"join": join.replace("/run", "/elsewhere")}),
            (ConnectError, "another key", {"join": wrong_key}),
        ]
        for kind, words, options in cases:
            with pytest.raises(kind, match=words):
                world.join_as(0, **options)
        world.keys[0] = tmp_path / "stranger.key"
        with pytest.raises(ConnectError, match="ask the operator to add this line"):
            world.join_as(0)
    codes = {event["code"] for event in world.events("refused")}
    assert {"cut-mismatch", "model-mismatch", "unknown-run", "not-authorized"} <= codes
