"""For every architecture of the table: what two parts train merges into what the two parts compute."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from splitfl import attach_trunk, load_ends, load_trunk
from splitfl.adapters import LoraSettings, attach_lora, merge, named_trainables, save_part
from tests.families import FAMILIES, VOCABULARY, save_family

SETTINGS = LoraSettings(rank=3, alpha=6.0)
IDENTITY = {"config": "c" * 64, "index": None, "shards": {}, "revision": None}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_two_adapters_become_one(tmp_path, family):
    base = save_family(family, tmp_path / "base")
    whole = named_trainables(attach_lora(AutoModelForCausalLM.from_pretrained(base), SETTINGS, seed=1))
    ends = attach_lora(load_ends(base, (1, 1)), SETTINGS, seed=1)
    trunk = attach_lora(load_trunk(base, (1, 1)), SETTINGS, seed=1)
    attach_trunk(ends, trunk)
    together = named_trainables(ends) | named_trainables(trunk)
    assert together.keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in together.items())

    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in together.values():
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.05)
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=generator)
    ends.eval(), trunk.eval()
    for part, model in (("ends", ends), ("trunk", trunk)):
        save_part(
            tmp_path / part, model, part=part, base=str(base), identity=IDENTITY, cut="1:1", trainables="lora",
            lora=SETTINGS, task="causal-lm", step=1,
        )  # fmt: skip
    merge(tmp_path / "ends", tmp_path / "trunk", tmp_path / "adapter")
    merge(tmp_path / "ends", tmp_path / "trunk", tmp_path / "whole", full_weights=True)
    plain = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        expected = ends(input_ids=ids).logits
        assert (plain(input_ids=ids).logits - expected).abs().max() > 1e-3
        adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        assert torch.equal(adapted(input_ids=ids).logits, expected)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
        assert (merged(input_ids=ids).logits - expected).abs().max() < 1e-4
