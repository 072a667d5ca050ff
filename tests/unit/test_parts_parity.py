"""Ends and trunk, loaded from disk and composed in one process, equal the unsplit model to the last bit.

The families are those of ``tests/families.py``. Same batch layout on both sides, dropout 0, training mode.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from splitfl.errors import ModelError
from splitfl.parts.loading import attach_trunk, load_ends, load_trunk, trunk_forward
from tests.families import FAMILIES, VOCABULARY, Family, save_family

ROWS, TOKENS = 3, 8
CUTS = ((1, 1), (2, 1), (0, 0), (1, 3))
CLASSIFIERS = tuple(family for family in FAMILIES if family.classifies)


@dataclass
class Saved:
    family: Family
    directory: Path
    full: Any


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    family = request.param
    directory = save_family(family, tmp_path_factory.mktemp(family.name))
    return Saved(family, directory, AutoModelForCausalLM.from_pretrained(directory).train())


def layouts(packs: bool) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    left = torch.ones(ROWS, TOKENS, dtype=torch.int64)
    left[1, :3] = 0
    left[2, :1] = 0
    yield "unpadded", {}
    yield "left-padded", {"attention_mask": left}
    yield "right-padded", {"attention_mask": left.flip(1)}
    if packs:
        yield "packed", {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]]).expand(ROWS, -1)}
    counted = (left.cumsum(1) - 1).masked_fill(left == 0, 1)
    if packs:
        yield "left-padded with positions", {"attention_mask": left, "position_ids": counted}


def tokens() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))


def gradients(*models: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for model in models for name, parameter in model.named_parameters()}


def largest_gradient_difference(full: torch.nn.Module, *parts: torch.nn.Module) -> float:
    """Largest absolute difference of any gradient; the names must be the full model's, each exactly once."""
    expected, found = gradients(full), gradients(*parts)
    assert sum(1 for part in parts for _ in part.named_parameters()) == len(found)
    assert found.keys() == expected.keys()
    assert any(gradient is not None and gradient.abs().max() > 1e-3 for gradient in expected.values())
    largest = 0.0
    for name, gradient in expected.items():
        assert (gradient is None) == (found[name] is None), name
        if gradient is not None:
            largest = max(largest, float((gradient - found[name]).abs().max()))
    return largest


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"{cut[0]}:{cut[1]}")
def test_logits_loss_and_gradients_are_the_unsplit_models(saved: Saved, cut: tuple[int, int]) -> None:
    ends = load_ends(saved.directory, cut).train()
    trunk = load_trunk(saved.directory, cut).train()
    attach_trunk(ends, trunk)
    assert ends.layout.packing == saved.family.packs
    for name, layout in layouts(saved.family.packs):
        batch = {"input_ids": tokens(), **layout}
        mask = layout.get("attention_mask", torch.ones(ROWS, TOKENS))
        batch["labels"] = batch["input_ids"].masked_fill(mask == 0, -100)
        for model in (saved.full, ends, trunk):
            model.zero_grad()
        # Without a cache, for Hugging Face keeps packed sequences apart only then.
        expected = saved.full(**batch, use_cache=False)
        found = ends(**batch)
        assert torch.equal(expected.logits, found.logits), name
        assert torch.equal(expected.loss, found.loss), name
        expected.loss.backward()
        found.loss.backward()
        assert largest_gradient_difference(saved.full, ends, trunk) <= 1e-6, name


@pytest.mark.parametrize("family", CLASSIFIERS, ids=lambda family: family.name)
def test_a_classification_head_trains_on_the_same_trunk(family: Family, tmp_path: Path) -> None:
    save_family(family, tmp_path, task="sequence-classification")
    full = AutoModelForSequenceClassification.from_pretrained(tmp_path).train()
    ends = load_ends(tmp_path, (1, 1), task="sequence-classification").train()
    trunk = load_trunk(tmp_path, (1, 1)).train()
    attach_trunk(ends, trunk)
    for side in ("left", "right"):
        mask = torch.ones(ROWS, TOKENS, dtype=torch.int64)
        mask[1, 5:] = 0
        mask = mask.flip(1) if side == "left" else mask
        batch = {
            "input_ids": tokens().masked_fill(mask == 0, 0),
            "attention_mask": mask,
            "labels": torch.tensor([0, 2, 1]),
        }
        for model in (full, ends, trunk):
            model.zero_grad()
        expected, found = full(**batch, use_cache=False), ends(**batch)
        assert torch.equal(expected.logits, found.logits)
        assert torch.equal(expected.loss, found.loss)
        expected.loss.backward()
        found.loss.backward()
        assert largest_gradient_difference(full, ends, trunk) <= 1e-6


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(FAMILIES[0], tmp_path_factory.mktemp("llama"))


def test_the_parts_hold_exactly_their_blocks(llama: Path) -> None:
    ends, trunk = load_ends(llama, (2, 1)), load_trunk(llama, (2, 1))
    held = {name.split(".")[2] for name in trunk.state_dict()}
    assert held == {"2", "3"}
    assert {name.split(".")[2] for name in ends.state_dict() if ".layers." in name} == {"0", "1", "4"}
    assert {name for name in ends.state_dict() if ".layers." not in name} >= {
        "model.embed_tokens.weight",
        "model.norm.weight",
    }


def test_tied_embeddings_stay_tied_on_the_client(llama: Path) -> None:
    ends = load_ends(llama)
    assert ends.lm_head.weight is ends.model.embed_tokens.weight


def test_attaching_changes_no_name(llama: Path) -> None:
    ends, trunk = load_ends(llama), load_trunk(llama)
    before = list(ends.state_dict())
    attach_trunk(ends, trunk)
    assert list(ends.state_dict()) == before
    attach_trunk(ends, None)
    with pytest.raises(ModelError, match="no trunk yet"):
        ends(input_ids=tokens())


def test_loading_reports_nothing_amiss(llama: Path) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        load_ends(llama, (1, 2))
        load_trunk(llama, (1, 2))
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == []


def test_a_new_head_follows_the_seed(llama: Path) -> None:
    first, again, other = (
        load_ends(llama, task="sequence-classification", num_labels=4, seed=seed).score.weight for seed in (1, 1, 2)
    )
    assert first.shape == (4, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_bf16(llama: Path) -> None:
    """Both sides in bf16 run the same kernels on the same numbers as the unsplit model in bf16: still no difference."""
    full = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).train()
    ends, trunk = load_ends(llama, dtype="bfloat16").train(), load_trunk(llama, dtype=torch.bfloat16).train()
    assert {parameter.dtype for model in (ends, trunk) for parameter in model.parameters()} == {torch.bfloat16}
    attach_trunk(ends, trunk)
    expected = full(input_ids=tokens(), labels=tokens(), use_cache=False)
    found = ends(input_ids=tokens(), labels=tokens())
    assert torch.equal(expected.logits, found.logits)
    expected.loss.backward()
    found.loss.backward()
    assert largest_gradient_difference(full, ends, trunk) == 0


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_attention_implementation(llama: Path, attn: str) -> None:
    full = AutoModelForCausalLM.from_pretrained(llama, attn_implementation=attn)
    ends, trunk = load_ends(llama, attn=attn), load_trunk(llama, attn=attn)
    assert ends.config._attn_implementation == trunk.config._attn_implementation == attn
    attach_trunk(ends, trunk)
    assert torch.equal(full(input_ids=tokens()).logits, ends(input_ids=tokens()).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(llama: Path, reentrant: bool) -> None:
    ends, trunk = load_ends(llama).train(), load_trunk(llama).train()
    attach_trunk(ends, trunk)
    ends(input_ids=tokens(), labels=tokens()).loss.backward()
    expected = gradients(ends, trunk)
    for model in (ends, trunk):
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ends(input_ids=tokens(), labels=tokens()).loss.backward()
    for name, gradient in gradients(ends, trunk).items():
        assert torch.allclose(gradient, expected[name], atol=1e-6), name


def test_peft_names_and_gradients_are_the_full_models(llama: Path) -> None:
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    full = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), settings)
    ends, trunk = get_peft_model(load_ends(llama), settings), get_peft_model(load_trunk(llama), settings)
    attach_trunk(ends, trunk)
    weights = dict(full.named_parameters())
    with torch.no_grad():
        for model in (ends, trunk):
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
    expected, found = (
        full(input_ids=tokens(), labels=tokens(), use_cache=False),
        ends(input_ids=tokens(), labels=tokens()),
    )
    assert torch.equal(expected.logits, found.logits)
    expected.loss.backward()
    found.loss.backward()
    assert largest_gradient_difference(full, ends, trunk) <= 1e-6
    assert ends.peft_config["default"].base_model_name_or_path == str(llama)
    with trunk.disable_adapter(), ends.disable_adapter(), full.disable_adapter():
        assert torch.equal(full(input_ids=tokens()).logits, ends(input_ids=tokens()).logits)


def test_greedy_text_is_the_unsplit_models(llama: Path) -> None:
    ends = load_ends(llama)
    attach_trunk(ends, load_trunk(llama))
    full = AutoModelForCausalLM.from_pretrained(llama)
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = full.generate(tokens()[:1], **options)
    assert expected.shape[1] > TOKENS
    assert torch.equal(expected, ends.generate(tokens()[:1], **options))


def test_a_cache_is_refused_in_a_sentence(llama: Path) -> None:
    ends = load_ends(llama)
    attach_trunk(ends, load_trunk(llama))
    with pytest.raises(ModelError, match="use_cache=False"):
        ends.generate(tokens()[:1], max_new_tokens=2, use_cache=True)


def test_saved_ends_load_again(llama: Path, tmp_path: Path) -> None:
    """save_pretrained on the ends writes the ends alone, and load_ends reads them back."""
    ends = load_ends(llama, (1, 1))
    with torch.no_grad():
        ends.model.norm.weight.add_(1)
    ends.save_pretrained(tmp_path)
    again = load_ends(tmp_path, (1, 1))
    assert torch.equal(again.model.norm.weight, ends.model.norm.weight)
    assert again.state_dict().keys() == ends.state_dict().keys()


def test_a_copy_of_the_ends_runs_on_the_same_trunk(llama: Path) -> None:
    ends, trunk = load_ends(llama), load_trunk(llama)
    calls: list[int] = []

    def counted(h: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor:
        calls.append(h.shape[1])
        return trunk_forward(trunk, h, mask, positions)

    attach_trunk(ends, counted)
    copied = copy.deepcopy(ends)
    assert torch.equal(copied(input_ids=tokens()).logits, ends(input_ids=tokens()).logits)
    assert len(calls) == 2


def test_a_failed_call_leaves_nothing_behind(llama: Path) -> None:
    ends = load_ends(llama)
    trunk = load_trunk(llama)
    attach_trunk(ends, lambda h, mask, positions: h[:, 1:])
    mask = torch.ones(ROWS, TOKENS, dtype=torch.int64)
    mask[:, :4] = 0
    with pytest.raises(ModelError, match="returned a hidden state of shape"):
        ends(input_ids=tokens(), attention_mask=mask)
    attach_trunk(ends, trunk)
    full = AutoModelForCausalLM.from_pretrained(llama)
    assert torch.equal(ends(input_ids=tokens()).logits, full(input_ids=tokens()).logits)


def test_two_threads_may_run_one_trunk(llama: Path) -> None:
    trunk = load_trunk(llama).eval()
    inputs = [torch.randn(1, TOKENS, 32, generator=torch.Generator().manual_seed(n)) for n in range(8)]
    with torch.no_grad():
        expected = [trunk(h) for h in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda h: trunk(h).detach(), inputs))
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_peft_on_all_linear_layers_with_checkpointing(llama: Path, tmp_path: Path) -> None:
    """Adapters land in the held blocks alone, on both sides, and are saved without a look at what is not held."""
    ends = get_peft_model(load_ends(llama), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    trunk = get_peft_model(load_trunk(llama), LoraConfig(r=2, target_modules="all-linear"))
    attach_trunk(ends, trunk)
    for model in (ends, trunk):
        model.train()
        model.gradient_checkpointing_enable()
    ends(input_ids=tokens(), labels=tokens()).loss.backward()
    trained = {name for model in (ends, trunk) for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 5 * 7 * 2
    assert all(p.grad is not None for model in (ends, trunk) for p in model.parameters() if p.requires_grad)
    trunk.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as saved_adapter:
        assert {name.split(".")[4] for name in saved_adapter.keys()} == {"1", "2", "3"}  # noqa: SIM118


def test_the_auxiliary_loss_of_a_mixture_is_refused_at_call_time(tmp_path: Path) -> None:
    save_family(next(family for family in FAMILIES if family.name == "mixtral"), tmp_path)
    ends = load_ends(tmp_path)
    attach_trunk(ends, load_trunk(tmp_path))
    with pytest.raises(ModelError, match="auxiliary loss"):
        ends(input_ids=tokens(), output_router_logits=True)


def test_rows_that_would_change_everybodys_rotary_table_are_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = FAMILIES[0].config()
    config.rope_parameters, config.max_position_embeddings = rope, 10
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    ends, full = load_ends(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    attach_trunk(ends, load_trunk(tmp_path))
    assert torch.equal(ends(input_ids=tokens()).logits, full(input_ids=tokens()).logits)
    with pytest.raises(ModelError, match="more than 10 tokens"):
        ends(input_ids=tokens().repeat(1, 2))


def test_a_model_that_comes_with_its_own_code(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path, str(tmp_path / "modules")])
    custom = tmp_path / "custom"
    shutil.copytree(llama, custom)
    config = json.loads((llama / "config.json").read_text())
    config |= {
        "model_type": "odd",
        "auto_map": {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"},
    }
    (custom / "config.json").write_text(json.dumps(config))
    (custom / "odd.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class OddConfig(LlamaConfig):\n    model_type = 'odd'\n\n\n"
        "class OddForCausalLM(LlamaForCausalLM):\n    config_class = OddConfig\n"
    )
    ends, trunk = load_ends(custom, trust_remote_code=True), load_trunk(custom, trust_remote_code=True)
    attach_trunk(ends, trunk)
    assert type(ends).__name__ == "OddForCausalLM"
    full = AutoModelForCausalLM.from_pretrained(llama)
    assert torch.equal(ends(input_ids=tokens()).logits, full(input_ids=tokens()).logits)
