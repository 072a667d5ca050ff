"""The architectures that must split exactly, one tiny random config each. Parity tests draw their list from here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

BLOCKS = 5
HIDDEN = 32
VOCABULARY = 96


@dataclass(frozen=True)
class Family:
    """``config``: builds a tiny config. ``packs``: whether position_ids keep packed sequences apart in this family."""

    name: str
    config: Callable[[], Any]
    packs: bool = True
    classifies: bool = True


def _modern(name: str, **extra: Any) -> Any:
    """A config in the names that Llama and its descendants use."""
    base: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.1,
    }
    return getattr(transformers, name)(**{**base, **extra})


_COMMON = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
}


def _without(name: str, *left_out: str, **extra: Any) -> Any:
    """The same for a family that has no such field."""
    base = _modern("LlamaConfig").to_dict()
    keys = [key for key in base if key in _COMMON and key not in left_out]
    return getattr(transformers, name)(**{**{key: base[key] for key in keys}, **extra})


_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}

FAMILIES = (
    Family("llama", lambda: _modern("LlamaConfig", tie_word_embeddings=True)),
    Family("qwen2", lambda: _modern("Qwen2Config")),
    Family("qwen3", lambda: _modern("Qwen3Config")),
    Family("qwen3-moe", lambda: _modern("Qwen3MoeConfig", **_MOE)),
    Family("mistral", lambda: _modern("MistralConfig", sliding_window=3)),
    Family("mixtral", lambda: _modern("MixtralConfig", num_local_experts=4, num_experts_per_tok=2)),
    Family("gemma2", lambda: _modern("Gemma2Config", sliding_window=3, query_pre_attn_scalar=8)),
    Family("gemma3", lambda: _modern("Gemma3TextConfig", sliding_window=3, query_pre_attn_scalar=8)),
    Family("glm", lambda: _modern("GlmConfig")),
    Family("glm4", lambda: _modern("Glm4Config")),
    Family("phi3", lambda: _without("Phi3Config")),
    Family("olmo2", lambda: _without("Olmo2Config")),
    Family("smollm3", lambda: _without("SmolLM3Config", no_rope_layer_interval=2)),
    Family("cohere", lambda: _without("CohereConfig"), classifies=False),
    Family(
        "gpt-oss",
        lambda: _modern("GptOssConfig", num_local_experts=4, num_experts_per_tok=2, sliding_window=3),
        packs=False,
    ),
    Family(
        "gpt2",
        lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=64,
            n_embd=HIDDEN,
            n_layer=BLOCKS,
            n_head=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.1,
        ),
    ),
    Family("gpt-neox", lambda: _without("GPTNeoXConfig", "num_key_value_heads")),
    Family(
        "opt",
        lambda: transformers.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            ffn_dim=48,
            num_hidden_layers=BLOCKS,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=HIDDEN // 2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            init_std=0.1,
        ),
        packs=False,
    ),
    Family(
        "falcon",
        lambda: transformers.FalconConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=BLOCKS,
            num_attention_heads=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.1,
        ),
        packs=False,
    ),
    Family(
        "bloom",
        lambda: transformers.BloomConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            n_layer=BLOCKS,
            n_head=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.1,
        ),
        packs=False,
    ),
    Family(
        "granite",
        lambda: _without("GraniteConfig", embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=8.0),
        classifies=False,
    ),
    Family("phi", lambda: _without("PhiConfig")),
    Family("stablelm", lambda: _without("StableLmConfig")),
    Family("starcoder2", lambda: _without("Starcoder2Config", sliding_window=3)),
    Family("exaone4", lambda: _without("Exaone4Config", sliding_window=3, sliding_window_pattern=2)),
    Family("ernie4.5", lambda: _modern("Ernie4_5Config"), classifies=False),
)


def no_dropout(config: Any) -> Any:
    """The config with every dropout at zero: two forwards of one model must be comparable."""
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def save_family(
    family: Family,
    directory: Path,
    *,
    task: str = "causal-lm",
    dtype: torch.dtype = torch.float32,
    shard_size: str = "40KB",
) -> Path:
    """Writes a checkpoint of the family, seeded random weights, several shards, as save_pretrained does."""
    factory = transformers.AutoModelForCausalLM if task == "causal-lm" else transformers.AutoModelForSequenceClassification
    config = no_dropout(family.config())
    if task != "causal-lm":
        config.num_labels = 3
    torch.manual_seed(0)
    model = factory.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases start at one and zero, where mistakes cancel
                generator = torch.Generator().manual_seed(len(name))
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    model.save_pretrained(directory, max_shard_size=shard_size)
    return directory
