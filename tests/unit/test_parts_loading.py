"""Loading from a directory: shards that are not held may be missing, and what is wrong is said in a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import splitfl
from benchmarks import memory
from splitfl.errors import ModelError
from splitfl.parts.loading import attach_trunk, load_ends, load_trunk
from splitfl.parts.plan import plan
from tests.families import FAMILIES, save_family

BY_NAME = {family.name: family for family in FAMILIES}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(FAMILIES[0], tmp_path_factory.mktemp("llama"), shard_size="16KB")


def copy_without(source: Path, target: Path, shards: set[str]) -> Path:
    shutil.copytree(source, target, ignore=lambda folder, names: shards & set(names))
    return target


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "gpt2", "opt", "bloom", "gpt-oss"])
def test_the_shards_that_are_not_held_may_be_deleted(name: str, tmp_path: Path) -> None:
    whole = save_family(BY_NAME[name], tmp_path / "whole", shard_size="16KB")
    found = plan(whole, (1, 2))
    for load, side in ((load_ends, found.ends), (load_trunk, found.trunk)):
        deleted = set(found.files) - set(side.files)
        assert deleted
        part = load(copy_without(whole, tmp_path / load.__name__, deleted), (1, 2))
        expected = AutoModelForCausalLM.from_pretrained(whole).state_dict()
        for tensor, value in part.state_dict().items():
            assert torch.equal(value, expected[tensor]), tensor
        held = list(part.parameters())
        assert side.parameters == sum(parameter.numel() for parameter in held)
        assert side.nbytes == sum(parameter.nbytes for parameter in held)
        assert side.tensors == len(held)


def test_a_held_shard_that_is_missing_is_named(llama: Path, tmp_path: Path) -> None:
    needed = sorted(set(plan(llama, (1, 1)).trunk.files))[0]
    with pytest.raises(ModelError, match=f"lacks {needed}"):
        load_trunk(copy_without(llama, tmp_path / "part", {needed}), (1, 1))


def test_a_shard_cut_short_is_named(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "cut")
    shard = tmp_path / "cut" / plan(llama, (1, 1)).trunk.files[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match=shard.name):
        load_trunk(tmp_path / "cut", (1, 1))


@pytest.mark.parametrize("load", [load_ends, load_trunk])
def test_mistakes_in_the_path(load: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no directory"):
        load(str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="PEFT adapter"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ModelError, match="config of"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("not json")
    with pytest.raises(ModelError):
        load(tmp_path)


def test_weights_as_pickles_are_refused(llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="no safetensors weights"):
        load_trunk(tmp_path)


def test_code_that_comes_with_a_model_is_not_run_unasked(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "custom")
    config = json.loads((llama / "config.json").read_text())
    config |= {
        "model_type": "custom",
        "auto_map": {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"},
    }
    (tmp_path / "custom" / "config.json").write_text(json.dumps(config))
    (tmp_path / "custom" / "custom.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_ends(tmp_path / "custom")
    assert not (tmp_path / "ran").exists()


def test_an_unknown_task_names_those_there_are(llama: Path) -> None:
    with pytest.raises(ModelError, match="causal-lm or sequence-classification"):
        load_ends(llama, task="translation")  # type: ignore[arg-type]


def test_loading_leaves_the_callers_random_numbers_alone(llama: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load_ends(llama)
    load_trunk(llama)
    load_ends(llama, task="sequence-classification", num_labels=2, seed=1)
    assert torch.equal(torch.rand(2), expected)


def test_the_public_names() -> None:
    assert splitfl.load_ends is load_ends
    assert splitfl.load_trunk is load_trunk


def test_dtype_converts_on_loading(llama: Path) -> None:
    trunk = load_trunk(llama, dtype="float16")
    assert {parameter.dtype for parameter in trunk.parameters()} == {torch.float16}
    assert {parameter.dtype for parameter in load_trunk(llama).parameters()} == {torch.float32}


def test_the_real_model_loads_and_holds_its_own_weights() -> None:
    real = Path(__file__).parents[3] / "shared" / "data" / "models" / "stories260K"
    if not real.is_dir():
        pytest.skip("needs ../shared/data/models/stories260K, which is not there")
    trunk = load_trunk(real, (1, 1))
    with safe_open(real / "model.safetensors", "pt") as opened:
        for name, value in trunk.state_dict().items():
            assert torch.equal(opened.get_tensor(name), value)


@pytest.mark.skipif(memory._status("VmHWM") is None, reason="peak memory can be reset on Linux only")
def test_a_side_uses_memory_for_its_own_part_alone(capfd: pytest.CaptureFixture[str]) -> None:
    assert memory.main(["--quick", "--json"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    held = {part: result[part]["held_bytes"] for part in ("client", "server")}
    assert 0 < result["checkpoint_bytes"] - sum(held.values()) < 1e6  # the headers of the shards
    for part in ("client", "server"):
        assert result[part]["ratio"] <= memory.BAR
        assert held[part] <= result[part]["read_bytes"] <= 1.05 * held[part] + 1e6


def test_a_call_that_was_interrupted_leaves_no_mask_behind(llama: Path) -> None:
    ends = load_ends(llama, (1, 1))
    seen: list[torch.Tensor | None] = []

    def trunk(h: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor:
        seen.append(mask)
        if len(seen) == 1:
            raise KeyboardInterrupt
        return h

    attach_trunk(ends, trunk)
    ids, mask = torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64)
    with pytest.raises(KeyboardInterrupt):
        ends(input_ids=ids, attention_mask=mask)
    ends(input_ids=ids)
    assert seen[1] is None
    load_ends(llama, (1, 1))  # probed again, in the same thread
