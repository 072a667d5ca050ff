"""Tiny random models, one for each thing that adapters and results have to mind."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

from splitfl.sample.model import byte_tokenizer

CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0,
    ),
    "llama-tied": LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        tie_word_embeddings=True, pad_token_id=0,
    ),
    "gpt2": GPT2Config(
        vocab_size=40, n_positions=32, n_embd=16, n_layer=4, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        pad_token_id=0,
    ),
    "mixtral": MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, pad_token_id=0,
    ),
}  # fmt: skip


def save_bases(root: Path) -> Path:
    """Each model as a Hugging Face directory under ``root``."""
    for name, config in CONFIGS.items():
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    return root
