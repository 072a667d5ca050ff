"""For every architecture of the table: two adapters merge into what the two parts compute, and clients can have their own."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from splitfl import attach_trunk, load_ends, load_trunk
from splitfl.adapters import LoraSettings, attach_lora, describe_part, merge, named_trainables, save_part
from splitfl.adapters.grouped import ClientLoras
from splitfl.parts.packed import run_segments
from splitfl.parts.rows import Rows
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
        about = describe_part(
            model, part=part, base=str(base), identity=IDENTITY, cut="1:1", trainables="lora", lora=SETTINGS, task="causal-lm",
            step=1,
        )  # fmt: skip
        save_part(tmp_path / part, model, about)
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


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_each_client_has_its_own_adapter_in_a_mixed_batch(tmp_path, family):
    base = save_family(family, tmp_path / "base")
    mixed = load_trunk(base, (1, 1))
    loras = ClientLoras(mixed, SETTINGS, seed=1)
    loras.try_out(mixed)
    wire, owners = ((5, 0), (3, 1), (4, 0)), ("ada", "ben", "ada")
    size = mixed.layout.hidden_size
    flat = torch.randn(12, size, generator=torch.Generator().manual_seed(0))
    own = {owner: loras.add(owner, rank=rank, alpha=6.0) for owner, rank in (("ada", 3), ("ben", 5))}
    places = {"ada": [*range(5), *range(8, 12)], "ben": [5, 6, 7]}
    draw = torch.Generator().manual_seed(3)
    for parameters in own.values():
        for value in parameters.values():
            value.data += 0.05 * torch.randn(value.shape, generator=draw)
    with torch.no_grad():
        y = run_segments(mixed, flat, Rows(wire, False, owners))
        for owner, rank in (("ada", 3), ("ben", 5)):
            alone = attach_lora(load_trunk(base, (1, 1)), LoraSettings(rank=rank, alpha=6.0), seed=1)
            for name, value in named_trainables(alone).items():
                value.copy_(own[owner][name])
            rows = Rows(tuple(each for each, whose in zip(wire, owners, strict=True) if whose == owner), False)
            torch.testing.assert_close(y[places[owner]], run_segments(alone, flat[places[owner]], rows), rtol=1e-5, atol=1e-5)
