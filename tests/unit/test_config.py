"""The run config: one table, checked; TOML and flags give the same; nothing is guessed."""

import argparse
import json
import math

import pytest

from server_trunk.command import add_arguments, config_from
from splitfl.config import LoraSettings, build_config, read_toml, to_toml
from splitfl.errors import ConfigError


def parse(*words: str):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return config_from(parser.parse_args(words))


def test_the_printed_config_reads_back_to_itself(tmp_path):
    config = parse(
        "some/model",
        "--cut",
        "2:1",
        "--lora-targets",
        "q_proj,v_proj",
        "--lr",
        "3e-4",
        "--until-done",
        "--revision",
        'a"b',
    )
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    assert build_config(read_toml(file)) == config


def test_flags_win_over_the_file(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text('model = "m"\nclients = 2\n[optimizer]\nlearning_rate = 1\n')
    config = parse("--config", str(file), "--clients", "5")
    assert (config.clients, config.optimizer.learning_rate) == (5, 1.0)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({}, "no model"),
        ({"model": "m", "clinets": 3}, "did you mean 'clients'"),
        ({"model": "m", "clients": 0}, "at least 1"),
        ({"model": "m", "clients": "3"}, "must be a int"),
        ({"model": "m", "clients": True}, "must be a int"),
        ({"model": "m", "trainables": "some"}, "lora, full, none"),
        ({"model": "m", "optimizer.schedule": "cosine"}, "give --steps"),
        ({"model": "m", "optimizer.steps": 5, "optimizer.warmup_steps": 9}, "larger than steps"),
        ({"model": "m", "optimizer.clipping": "joint", "clients": 2}, "leave clients at 1"),
        ({"model": "m", "optimizer.clipping": "joint", "mode": "async"}, "use --mode sync"),
        ({"model": "m", "optimizer.clipping": "joint", "adapters": "per-client"}, "leave adapters at shared"),
        ({"model": "m", "optimizer.clipping": "joint", "trainables": "none"}, "leave clipping out"),
        ({"model": "m", "optimizer.clipping": "joint", "optimizer.clip": 0.0}, "give --clip"),
        ({"model": "m", "optimizer.clipping": "joint", "shard": "fsdp", "shard_size": 2}, "use --shard layers or none"),
        ({"model": "m", "lora.dropout": 1.0}, "[0, 1)"),
        ({"model": "m", "step_deadline": math.inf}, "finite"),
        ({"model": "m", "batch_wait": 1e12}, "[0, 1e+09)"),
        ({"model": "m", "graphs": "keep", "graph_tokens": 9}, "graph_tokens at 0"),
        ({"model": "m", "mode": "async", "batch_wait": 1.0}, "batch_wait at 0"),
        ({"model": "m", "mode": "async", "round_steps": 2}, "round_steps at 0"),
        ({"model": "m", "restarts": 5}, "use --mode hierarchical"),
        ({"model": "m", "quantize": "4bit", "dtype": "float64"}, "computes in float32 or bfloat16"),
        ({"model": "m", "quantize": "4bit", "trainables": "full"}, "use --trainables lora"),
        ({"model": "m", "async_contributions": 2}, "use --mode async"),
        ({"model": "m", "mode": "hierarchical", "max_staleness": 2}, "use --mode async"),
        ({"model": "m", "limits.max_rank": 8}, "use --adapters per-client"),
        ({"model": "m", "round_steps": -1}, "at least 0"),
        ({"model": "m", "mode": "hierarchical", "replicas": 2, "sync": "2", "round_steps": 3}, "no multiple of sync = 2"),
    ],
)
def test_a_mistake_is_one_sentence(values, part):
    with pytest.raises(ConfigError) as caught:
        build_config(values)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["model = ", "\xff"])
def test_a_file_that_is_no_toml(tmp_path, text):
    file = tmp_path / "bad.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="not TOML"):
        read_toml(file)


def test_a_client_is_not_told_where_on_the_servers_disk_the_model_lies(tmp_path):
    terms = build_config({"model": str(tmp_path)}).terms()
    assert terms["model_is_local"]
    assert str(tmp_path) not in repr(terms)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"shard_size": 2}, "say how, with --shard"),
        ({"shard": "tensor"}, "give --shard-size"),
        ({"shard": "fsdp", "shard_size": 2, "mode": "async"}, "use --mode sync"),
        ({"shard": "fsdp", "shard_size": 2, "adapters": "per-client"}, "use --adapters shared"),
        ({"shard": "tensor", "shard_size": 2, "lanes": 2}, "leave lanes at 0"),
        ({"shard": "tensor", "shard_size": 2, "lora.dropout": 0.1}, "set --lora-dropout 0"),
    ],
)
def test_a_trunk_that_cannot_be_spread_so_is_refused_with_the_mend(values, said):
    with pytest.raises(ConfigError, match=said):
        build_config({"model": "m"} | values)


def test_what_has_a_say_only_in_some_runs_is_taken_there():
    build_config({"model": "m", "shard": "fsdp", "shard_size": 2, "restarts": 5})
    build_config({"model": "m", "quantize": "4bit", "dtype": "bfloat16"})
    build_config({"model": "m", "mode": "async", "async_contributions": 2, "max_staleness": 0})
    build_config({"model": "m", "adapters": "per-client", "limits.max_rank": 8})


def test_processes_that_are_not_there_are_asked_for_by_their_command(monkeypatch):
    from server_trunk.sharding.group import check_ranks, join_shards

    spread = {"shard": "tensor", "shard_size": 2}
    config = build_config({"model": "m"} | spread)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="1 processes were started, where the config asks for 2"):
        join_shards(config)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="4 processes were started"):
        join_shards(config)
    for replicas in (2, 0):
        check_ranks(build_config({"model": "m", **spread, "mode": "hierarchical", "replicas": replicas}), 4)
    with pytest.raises(ConfigError, match="asks for 4 replicas of 2"):
        check_ranks(build_config({"model": "m", **spread, "mode": "hierarchical", "replicas": 4}), 4)


@pytest.mark.parametrize(
    ("sync", "every", "kept"), [("step", 10, 10), ("4", 10, 12), ("5", 10, 10), ("100", 10, 100), ("4", 0, 0)]
)
def test_both_sides_keep_checkpoints_where_replicas_meet(sync, every, kept):
    config = build_config({"model": "m", "mode": "hierarchical", "sync": sync, "checkpoint_every": every})
    assert config.kept_every == config.terms()["checkpoint_every"] == kept


@pytest.mark.parametrize("lora", [LoraSettings(), LoraSettings(4, 8.0, 0.1, ("q_proj", "v_proj"))])
def test_lora_settings_that_travelled_are_the_same(lora):
    assert LoraSettings.from_plain(json.loads(json.dumps(lora.to_plain()))) == lora
