"""Blocks over several devices of one process; on one CPU, the hooks that would carry hidden states between them."""

from __future__ import annotations

import pytest
import torch
from accelerate import dispatch_model

from server_trunk.beforehand import layer_devices, run_device
from server_trunk.replicas import process
from server_trunk.replicas.place import Place
from splitfl.config import build_config
from splitfl.errors import ConfigError, ModelError
from splitfl.parts.layers import layer_map
from splitfl.parts.loading import load_trunk
from splitfl.parts.packed import run_segments, why_not_packed
from splitfl.parts.rows import Rows
from tests.families import FAMILIES, save_family
from tests.world import tiny_llama

GPUS = [torch.device("cuda", number) for number in range(3)]


def test_blocks_lie_in_equal_runs_and_what_is_beside_them_where_the_hidden_state_is(tmp_path):
    trunk = load_trunk(tiny_llama(tmp_path, blocks=9), (1, 1))
    found = layer_map(trunk, "model.layers", range(1, 8), GPUS)
    assert [found[f"model.layers.{index}"].index for index in range(9)] == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    beside = {name for name in found if not name.startswith("model.layers.")}
    assert beside == {"model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"}
    assert {found[name] for name in beside} == {GPUS[0]}
    with pytest.raises(ModelError, match="smaller --shard-size"):
        layer_map(trunk, "model.layers", range(1, 3), GPUS)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_a_trunk_whose_blocks_are_dispatched_computes_the_same(tmp_path, name):
    family = next(family for family in FAMILIES if family.name == name)
    path = save_family(family, tmp_path)
    rows = Rows(((5, 0), (3, 0)), False)

    def computed(trunk):
        h = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = run_segments(trunk, h, rows)
        return y, torch.autograd.grad(y.square().sum(), h)[0]

    reference = computed(load_trunk(path, (1, 1)))
    trunk = load_trunk(path, (1, 1))
    places = layer_map(trunk, trunk.layout.blocks, range(1, trunk.layout.count - 1), [torch.device("cpu")] * 2)
    dispatch_model(trunk, places, force_hooks=True)
    assert hasattr(trunk.get_submodule(trunk.layout.blocks)[1], "_hf_hook")
    assert all(torch.equal(one, other) for one, other in zip(computed(trunk), reference, strict=True))
    assert (why_not_packed(trunk) is None) == family.packs


@pytest.mark.parametrize(("device", "said"), [("auto", "this machine has 0"), ("cpu", "leave it at auto")])
def test_a_machine_without_the_gpus_says_so(monkeypatch, device, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    config = build_config({"model": "m", "shard": "layers", "shard_size": 2, "device": device})
    with pytest.raises(ConfigError, match=said):
        run_device(config)


def test_replicas_of_one_machine_have_gpus_of_their_own(monkeypatch):
    config = build_config({"model": "m", "mode": "hierarchical", "replicas": 2, "shard": "layers", "shard_size": 2})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for replica in range(2):
        monkeypatch.setenv("LOCAL_RANK", str(replica))
        assert run_device(config) == torch.device("cuda", 2 * replica)
        assert layer_devices(config) == [torch.device("cuda", 2 * replica + number) for number in range(2)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(ConfigError, match=r"asks for 4 GPUs, this machine has 3: give a smaller --shard-size, or start fewer"):
        run_device(config)


def test_a_replica_over_several_gpus_joins_as_such(monkeypatch):
    """Whatever it is that torchrun says of its rank: the GPUs are counted by its place on the machine."""
    config = build_config({"model": "m", "mode": "hierarchical", "shard": "layers", "shard_size": 2})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    joined: list[object] = []
    monkeypatch.setattr(process.Group, "join", lambda place, device, ranks: joined.append((device, ranks)))
    monkeypatch.setattr(process, "Watch", lambda limit, lost: None)
    monkeypatch.setattr(process, "Siblings", lambda: None)
    own, _ = process._joined(config, Place(3, 4, 1, 2, 1))
    assert joined == [(None, 1)]
    assert (own.device, own.replicas) == ("auto", 4)
