"""What cannot be split is refused in one sentence that names the reason, before a weight is read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaModel

from splitfl.errors import ConfigError, ModelError
from splitfl.parts.cut import Cut
from splitfl.parts.loading import load_ends, load_trunk
from splitfl.parts.probe import probe
from tests.families import BLOCKS, FAMILIES

LLAMA = FAMILIES[0]


def refusal(full: Any, config: Any) -> str:
    with pytest.raises(ModelError) as raised:
        probe(full, config, Cut(1, 1))
    text = str(raised.value)
    assert "\n" not in text
    assert full.__name__ in text
    return text


class Scaling(LlamaModel):
    """Runs its blocks on a hidden state that is scaled on the way from one to the next."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs):  # type: ignore[no-untyped-def]
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for index, block in enumerate(self.layers):
            h = block(h * 1.5 if index == 2 else h, attention_mask=None, position_ids=position_ids)
        return transformers.modeling_outputs.BaseModelOutputWithPast(last_hidden_state=self.norm(h))


class PerTokenInput(LlamaModel):
    """Gives each block something looked up from the tokens, as Gemma 3n does."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs):  # type: ignore[no-untyped-def]
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        looked_up = h.detach() * 2
        for block in self.layers:
            h = block(h, attention_mask=attention_mask, per_layer_input=looked_up)
        return transformers.modeling_outputs.BaseModelOutputWithPast(last_hidden_state=self.norm(h))


class HandingOn(LlamaModel):
    """Its blocks hand the next one a tensor beside the hidden state."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs):  # type: ignore[no-untyped-def]
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        chosen = None
        for block in self.layers:
            h, chosen = block(h, attention_mask=attention_mask, chosen=chosen)
        return transformers.modeling_outputs.BaseModelOutputWithPast(last_hidden_state=self.norm(h))


class Sharing(LlamaModel):
    """Its blocks share a dict that starts empty."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs):  # type: ignore[no-untyped-def]
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        shared: dict[str, Any] = {}
        for block in self.layers:
            h = block(h, attention_mask=attention_mask, shared=shared)
        return transformers.modeling_outputs.BaseModelOutputWithPast(last_hidden_state=self.norm(h))


class Skipping(LlamaModel):
    """Leaves out its last block."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs):  # type: ignore[no-untyped-def]
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for block in self.layers[:-1]:
            h = block(h, attention_mask=attention_mask)
        return transformers.modeling_outputs.BaseModelOutputWithPast(last_hidden_state=self.norm(h))


class Repeating(LlamaModel):
    """Uses one block's weights twice."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layers[3] = self.layers[1]


class Grouped(LlamaModel):
    """Keeps its blocks in a list of lists."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([nn.ModuleList(self.layers[:2]), nn.ModuleList(self.layers[2:])])


def with_backbone(backbone: type[LlamaModel]) -> type[LlamaForCausalLM]:
    def build(self: Any, config: Any) -> None:
        LlamaForCausalLM.__init__(self, config)
        self.model = backbone(config)

    return type(f"{backbone.__name__}Llama", (LlamaForCausalLM,), {"__init__": build})


@pytest.mark.parametrize(
    ("backbone", "reason"),
    [
        (Scaling, "something is applied to the hidden state between blocks 1 and 2"),
        (PerTokenInput, "block 1 receives per_layer_input, which cannot be rebuilt"),
        (HandingOn, "hand each other more than the hidden state: chosen"),
        (Sharing, "hand each other more than the hidden state: shared"),
        (Skipping, "has 5 blocks, but 4 are run"),
        (Repeating, "blocks 1 and 3 share weights"),
        (Grouped, "no list of its 5 blocks"),
    ],
)
def test_an_architecture_that_cannot_be_split(backbone: type[LlamaModel], reason: str) -> None:
    assert reason in refusal(with_backbone(backbone), LLAMA.config())


def test_gemma3n_names_its_stacked_hidden_state() -> None:
    config = transformers.Gemma3nTextConfig(
        vocab_size=96,
        vocab_size_per_layer_input=96,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        num_kv_shared_layers=0,
        layer_types=["full_attention"] * 5,
        activation_sparsity_pattern=[0.0] * 5,
    )
    assert "shape (4, 2, 6, 32)" in refusal(transformers.Gemma3nForCausalLM, config)


def test_gemma4_names_its_shared_keys_and_values() -> None:
    config = transformers.Gemma4TextConfig(vocab_size=96, hidden_size=32, num_hidden_layers=6)
    assert "shared_kv_states" in refusal(transformers.Gemma4ForCausalLM, config)


def test_an_encoder_decoder() -> None:
    assert "encoder-decoder" in refusal(transformers.BartForCausalLM, transformers.BartConfig())


def test_router_logits_are_refused_but_routers_are_not() -> None:
    moe = next(family for family in FAMILIES if family.name == "mixtral")
    config = moe.config()
    assert probe(transformers.MixtralForCausalLM, config, Cut(1, 1)).count == BLOCKS
    config.output_router_logits = True
    assert "output_router_logits" in refusal(transformers.MixtralForCausalLM, config)


def test_blocks_dropped_at_random() -> None:
    opt = next(family for family in FAMILIES if family.name == "opt")
    config = opt.config()
    config.layerdrop = 0.1
    assert "layerdrop=0.1" in refusal(transformers.OPTForCausalLM, config)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_dropout_and_real_scalars_in_the_probe(family: Any) -> None:
    """The families of the table pass with their dropout on, which the parity tests must turn off."""
    config = family.config()
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.5)
    full = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    layout = probe(full, config, Cut(1, 1))
    assert (layout.count, layout.hidden_size, layout.packing) == (BLOCKS, 32, family.packs)


def test_a_trunk_that_ran_the_multiplier_again_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Granite scales inputs_embeds by 12: without putting the true hidden state back, the probe must refuse."""
    granite = next(family for family in FAMILIES if family.name == "granite")
    monkeypatch.setattr("splitfl.parts.trunk._enter", lambda module, args, kwargs: (args, kwargs))
    assert "does not reach the trunk's block 1 unchanged" in refusal(transformers.GraniteForCausalLM, granite.config())


def test_probing_leaves_the_config_alone() -> None:
    config = LLAMA.config()
    before = copy.deepcopy(config.to_dict())
    probe(LlamaForCausalLM, config, Cut(1, 1))
    assert config.to_dict() == before


def test_probing_needs_no_room_for_blocks_or_vocabulary() -> None:
    """A model of some 400 GB is probed in the memory of a few of its rows."""
    config = LlamaConfig(
        vocab_size=256_000, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64
    )
    assert probe(LlamaForCausalLM, config, Cut(4, 4)).blocks == "model.layers"
    assert probe(LlamaForSequenceClassification, config, Cut(4, 4)).count == 80


@pytest.mark.parametrize("load", [load_ends, load_trunk])
def test_refused_before_any_weight_is_looked_for(load: Callable[..., Any], tmp_path: Path) -> None:
    config = LLAMA.config()
    config.save_pretrained(tmp_path)  # a config alone: had the loader gone on, it would have missed the weights
    with pytest.raises(ModelError, match="leaves no block for the trunk"):
        load(tmp_path, (3, 2))
    transformers.T5Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"language model head|encoder-decoder"):
        load(tmp_path)
    moe = next(family for family in FAMILIES if family.name == "qwen3-moe").config()
    moe.output_router_logits = True
    moe.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="output_router_logits"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["1", "1:2:3", "-1:1", "a:b", "1.5:1", ""])
def test_a_cut_is_two_whole_numbers(text: str) -> None:
    with pytest.raises(ConfigError, match="such as 1:1"):
        Cut.parse(text)


def test_cuts() -> None:
    assert Cut.parse("2:1").trunk_range(5) == range(2, 4)
    assert str(Cut.of((0, 3))) == "0:3"
    assert Cut.of("1:1") == Cut.of(Cut(1, 1)) == Cut.of([1, 1])
    for wrong in ((1,), (1, 2, 3), ("1", 1), (True, 1), 3):
        with pytest.raises(ConfigError):
            Cut.of(wrong)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="5 blocks"):
        Cut(3, 2).trunk_range(5)


def test_the_probe_does_not_disturb_the_callers_random_numbers() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    probe(LlamaForCausalLM, LLAMA.config(), Cut(1, 1))
    assert torch.equal(torch.rand(3), expected)
