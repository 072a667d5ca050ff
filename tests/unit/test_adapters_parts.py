"""Adapters on real parts: ends and trunk together train, and compute, what the adapted full model does."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from splitfl import attach_trunk, load_ends, load_trunk
from splitfl.adapters import LoraSettings, attach_lora, named_trainables, set_trainable
from tests.unit.adapter_models import CONFIGS, save_bases

SETTINGS = LoraSettings(rank=3, alpha=6.0)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return save_bases(tmp_path_factory.mktemp("bases"))


def train(model, how):
    if how == "lora":
        return attach_lora(model, SETTINGS, seed=4)
    set_trainable(model, how)
    return model


def stir(parameters):
    """Move every value (fresh ``lora_B`` are zero), the same by name wherever a parameter lives."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            generator = torch.Generator().manual_seed(sum(name.encode()))
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


@pytest.mark.parametrize("how", ["lora", "full"])
@pytest.mark.parametrize("cut", [(1, 1), (0, 0), (0, 3), (2, 1)])
@pytest.mark.parametrize("family", CONFIGS)
def test_parts_train_what_the_full_model_trains(bases, family, cut, how):
    full = train(AutoModelForCausalLM.from_pretrained(bases / family), how)
    ends = train(load_ends(bases / family, cut), how)
    trunk = train(load_trunk(bases / family, cut), how)
    attach_trunk(ends, trunk)
    whole = named_trainables(full)
    held, carried = named_trainables(ends), named_trainables(trunk)
    assert not held.keys() & carried.keys()
    together = held | carried
    assert together.keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in together.items())

    stir(whole)
    stir(together)
    ids = torch.randint(1, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    expected = full(input_ids=ids, labels=ids)
    got = ends(input_ids=ids, labels=ids)
    assert torch.equal(got.logits, expected.logits)
    expected.loss.backward()
    got.loss.backward()
    for name, value in together.items():
        assert value.grad is not None, name
        assert (value.grad - whole[name].grad).abs().max() <= 1e-6, name


def test_a_classifiers_parts_train_its_head_too(bases):
    options = {"num_labels": 3}
    torch.manual_seed(0)
    full = attach_lora(AutoModelForSequenceClassification.from_pretrained(bases / "llama", **options), SETTINGS, seed=4)
    ends = attach_lora(load_ends(bases / "llama", task="sequence-classification", seed=0, **options), SETTINGS, seed=4)
    trunk = attach_lora(load_trunk(bases / "llama"), SETTINGS, seed=4)
    names = named_trainables(ends).keys() | named_trainables(trunk).keys()
    assert names == named_trainables(full).keys()
    assert "score.weight" in named_trainables(ends)
