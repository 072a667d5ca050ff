"""Frozen weights laid out for decoding: which, and that nothing else about them changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from splitfl.parts.weight_layout import lay_out_for_decoding
from tests.families import FAMILIES, save_family

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="NOT TESTED: torch has no MKL here")


def columns(layer: nn.Linear) -> bool:
    """Whether a layer's weight lies column by column."""
    return layer.weight.stride() == (1, layer.out_features)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Of all shards of a checkpoint."""
    return {name: value for shard in directory.glob("*.safetensors") for name, value in load_file(shard).items()}


def test_only_frozen_float32_layers_with_short_rows_are_laid_out():
    frozen, trained, half, wide = (nn.Linear(*size) for size in ((8, 6), (8, 6), (8, 6), (2049, 3)))
    half.bfloat16()
    model = nn.ModuleList([frozen, trained, half, wide]).requires_grad_(False)
    trained.requires_grad_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(3, 8)
    y = frozen(x)
    parameter = frozen.weight
    lay_out_for_decoding(model)
    assert [columns(layer) for layer in (frozen, trained, half, wide)] == [True, False, False, False]
    assert frozen.weight is parameter
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(frozen(x), y)
    memory = frozen.weight.data_ptr()
    lay_out_for_decoding(model)
    assert frozen.weight.data_ptr() == memory


def test_a_head_that_is_the_embedding_too_is_left():
    embedding, head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
    head.weight = embedding.weight
    lay_out_for_decoding(nn.ModuleList([embedding, head]).requires_grad_(False))
    assert head.weight.is_contiguous()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_model_gives_the_same_and_is_saved_as_before(tmp_path, family):
    save_family(family, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").requires_grad_(False)
    ids = torch.arange(12).reshape(3, 4) + 5
    before = model(ids).logits
    lay_out_for_decoding(model)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "saved")
    was, saved = tensors(tmp_path / "model"), tensors(tmp_path / "saved")
    assert was.keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in was.items())


def test_a_lora_over_layers_laid_out_trains_and_is_merged_as_over_others(tmp_path):
    save_family(next(family for family in FAMILIES if family.name == "llama"), tmp_path / "model")
    ids = torch.arange(64).reshape(2, 32) + 5
    found = []
    for laid_out in (False, True):
        torch.manual_seed(1)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), LoraConfig(r=4))
        if laid_out:
            lay_out_for_decoding(model)
            assert any(columns(module) for module in model.modules() if isinstance(module, nn.Linear))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        for _ in range(3):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(model.merge_and_unload()(ids).logits.detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
