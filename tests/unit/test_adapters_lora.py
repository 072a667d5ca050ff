import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
)

from splitfl.adapters import LoraSettings, attach_lora, named_trainables, set_trainable
from splitfl.errors import ConfigError, ModelError


def llama(blocks=4, tie=False, cls=AutoModelForCausalLM, **extra):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=blocks, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tie, pad_token_id=0, **extra,
    )  # fmt: skip
    return cls.from_config(config)


def keep_blocks(model, kept):
    """A part, as far as adapters are concerned: the same model with other blocks passed through."""
    layers = model.model.layers
    for index in range(len(layers)):
        if index not in kept:
            layers[index] = nn.Identity()
    return model


SETTINGS = LoraSettings(rank=4, alpha=8.0)
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_parts_start_as_the_full_model_does():
    whole = named_trainables(attach_lora(llama(), SETTINGS, seed=5))
    torch.manual_seed(99)  # the global generator has no say
    trunk = named_trainables(attach_lora(keep_blocks(llama(), {1, 2}), SETTINGS, seed=5))
    ends = named_trainables(attach_lora(keep_blocks(llama(), {0, 3}), SETTINGS, seed=5))
    assert not trunk.keys() & ends.keys()
    assert trunk.keys() | ends.keys() == whole.keys()
    for name, value in {**trunk, **ends}.items():
        assert torch.equal(value, whole[name]), name


def test_the_start_has_pefts_distribution_and_depends_on_seed_and_name():
    whole = named_trainables(attach_lora(llama(), SETTINGS, seed=5))
    other = named_trainables(attach_lora(llama(), SETTINGS, seed=6))
    reference = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear"))
    reference_bound = max(float(p.detach().abs().max()) for n, p in reference.named_parameters() if "q_proj.lora_A" in n)
    a = [value for name, value in whole.items() if "q_proj.lora_A" in name]
    assert len({value[0, 0].item() for value in a}) == 4
    assert all(0.2 < value.abs().max().item() <= 0.25 for value in a)  # 1 / sqrt(16)
    assert 0.2 < reference_bound <= 0.25
    for name, value in whole.items():
        if ".lora_B." in name:
            assert not value.any()
        else:
            assert not torch.equal(value, other[name])


def test_attaching_leaves_the_callers_generator_alone():
    model = llama()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    attach_lora(model, SETTINGS, seed=1)
    assert torch.equal(torch.rand(4), expected)


def test_all_linear_means_the_linear_layers_inside_the_blocks():
    names = named_trainables(attach_lora(llama(blocks=2), SETTINGS, seed=0))
    modules = {name.split(".lora_")[0] for name in names}
    assert {name.rsplit(".", 1)[-1] for name in modules} == LINEARS
    assert len(modules) == 2 * len(LINEARS)
    assert all(name.startswith("model.layers.") for name in modules)
    assert list(names) == sorted(names)


def test_gpt2_conv1d_layers_are_targets():
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    wrapped = attach_lora(model, SETTINGS, seed=0)
    assert wrapped.peft_config["default"].fan_in_fan_out is True
    modules = {name.split(".lora_")[0] for name in named_trainables(wrapped)}
    assert modules == {
        f"transformer.h.{i}.{rest}" for i in range(2) for rest in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_fused_experts_are_left_out():
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    names = named_trainables(attach_lora(AutoModelForCausalLM.from_config(config), SETTINGS, seed=0))
    assert {name.split(".lora_")[0].split(".", 3)[3] for name in names} == {
        f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }


def test_named_targets():
    names = named_trainables(attach_lora(llama(), LoraSettings(targets=["q_proj", "mlp.down_proj"]), seed=0))
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names} == {"q_proj", "down_proj"}


@pytest.mark.parametrize("target", ["qproj", "lm_head", "embed_tokens", "input_layernorm", "proj"])
def test_a_target_that_is_no_linear_layer_of_a_block_is_refused(target):
    with pytest.raises(ConfigError, match=f"'{target}' names no linear layer.*choose among .*q_proj"):
        attach_lora(llama(), LoraSettings(targets=["v_proj", target]), seed=0)


def test_a_target_in_another_parts_block_is_no_mistake():
    ends = attach_lora(keep_blocks(llama(), {0, 3}), LoraSettings(targets=["v_proj", "layers.2.mlp.up_proj"]), seed=0)
    assert {name.split(".lora_")[0] for name in named_trainables(ends)} == {
        "model.layers.0.self_attn.v_proj",
        "model.layers.3.self_attn.v_proj",
    }


def test_a_part_without_blocks_comes_back_unwrapped_and_frozen():
    model = keep_blocks(llama(), set())
    assert attach_lora(model, SETTINGS, seed=0) is model
    assert named_trainables(model) == {}


def test_a_classification_head_trains_beside_the_adapter():
    model = llama(cls=AutoModelForSequenceClassification, num_labels=3)
    wrapped = attach_lora(model, SETTINGS, seed=0)
    assert isinstance(wrapped, PeftModel)
    assert "score.weight" in named_trainables(wrapped)
    ids = torch.randint(1, 32, (2, 5))
    wrapped(input_ids=ids, labels=torch.tensor([0, 2])).loss.backward()
    assert named_trainables(wrapped)["score.weight"].grad.any()
    without_blocks = attach_lora(
        keep_blocks(llama(cls=AutoModelForSequenceClassification, num_labels=3), set()), SETTINGS, seed=0
    )
    assert list(named_trainables(without_blocks)) == ["score.weight"]


def test_set_trainable():
    model = llama(tie=True)
    set_trainable(model, "full")
    names = named_trainables(model)
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names  # tied: one parameter, counted once
    assert sum(p.numel() for p in names.values()) == model.num_parameters()
    set_trainable(model, "none")
    assert named_trainables(model) == {}
    wrapped = attach_lora(model, SETTINGS, seed=0)
    set_trainable(wrapped, "none")
    assert named_trainables(wrapped) == {}
    set_trainable(wrapped, "lora")
    assert all(".lora_" in name for name in named_trainables(wrapped))
    with pytest.raises(ConfigError, match="either lora or full"):
        set_trainable(wrapped, "full")
    with pytest.raises(ConfigError, match="lora, full or none"):
        set_trainable(model, "some")


def test_prefix_names_a_submodule():
    whole = named_trainables(attach_lora(llama(), SETTINGS, seed=2))
    backbone = named_trainables(attach_lora(llama().model, SETTINGS, seed=2, full_name_prefix="model."))
    assert backbone
    for name, value in backbone.items():
        assert torch.equal(value, whole["model." + name])


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"rank": 0}, "rank"), ({"rank": 2.0}, "rank"), ({"alpha": 0.0}, "alpha"), ({"alpha": float("nan")}, "alpha"),
        ({"dropout": 1.0}, "dropout"), ({"targets": "q_proj"}, "targets"), ({"targets": []}, "targets"),
    ],
)  # fmt: skip
def test_settings_out_of_range(wrong, word):
    with pytest.raises(ConfigError, match=word):
        attach_lora(llama(), LoraSettings(**wrong), seed=0)


def test_a_module_that_is_no_model_is_refused():
    with pytest.raises(ModelError, match="no config"):
        attach_lora(nn.Linear(2, 2), SETTINGS, seed=0)
