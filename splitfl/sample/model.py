"""A small random Llama with a byte-level tokenizer, as an ordinary Hugging Face directory."""

from __future__ import annotations

import os
from typing import Any

from splitfl.directories import write_directory_atomically
from splitfl.errors import ConfigError

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
# Rounded up from 3 special tokens and 256 bytes.
VOCABULARY = 260


def build_sample_model(
    out_dir: str | os.PathLike[str],
    *,
    seed: int,
    hidden: int = 128,
    blocks: int = 6,
    heads: int = 4,
    intermediate: int | None = None,
    context: int = 512,
    tied: bool = False,
    overwrite: bool = False,
) -> None:
    """Write model and tokenizer to ``out_dir``; the weights (fp32) depend on ``seed`` and the sizes alone.

    ``hidden`` and ``intermediate`` (default 2.5 × hidden) are widths, ``context`` the largest number of tokens. The
    tokenizer has one token a byte: any UTF-8 text comes back from it unchanged.
    """
    if hidden % heads or (hidden // heads) % 2:
        raise ConfigError(f"The hidden size {hidden} has to be a multiple of twice the number of heads, {heads}.")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate or hidden * 5 // 2,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        # Wide enough to leave the plateau of letter frequencies within a demonstration's few steps: with the usual
        # 0.02 the loss of 60 steps stays above 3, with this it falls to about 2.
        initializer_range=0.02 if tied else 0.08,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        if not tied:
            torch.nn.init.normal_(model.model.embed_tokens.weight, std=1.0)
    with write_directory_atomically(out_dir, overwrite=overwrite) as directory:
        model.save_pretrained(directory)
        byte_tokenizer(context).save_pretrained(directory)


def byte_tokenizer(context: int = 512) -> Any:
    """A ``PreTrainedTokenizerFast`` with one token a byte, a BOS in front, and pad, BOS and EOS as ids 0, 1 and 2."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, BOS, EOS)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
