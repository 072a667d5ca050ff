"""A frozen trunk whose linear layers are held in 8 or 4 bits, by bitsandbytes through Hugging Face's loader.

8bit: LLM.int8() (Dettmers et al., arXiv 2208.07339); 4bit: NF4 with quantised constants (QLoRA, arXiv 2305.14314).
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import nn

from splitfl.errors import ConfigError, ModelError

__all__ = ["check_quantized", "keep_layout", "quantization_options"]


def quantization_options(quantize: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for ``quantize``: none, 8bit or 4bit; ``dtype`` is what is computed in.

    Raises ConfigError where bitsandbytes is not installed.
    """
    if quantize == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"quantize = {quantize} needs bitsandbytes: pip install 'splitfl[quantize]'")
    from transformers import BitsAndBytesConfig

    # It says with every call that its kernels compute in half precision.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if quantize == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    settings: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **settings)}


def check_quantized(model: nn.Module) -> None:
    """Raises ModelError where nothing of a loaded trunk is in fewer bits: its weights are in no linear layers."""
    if not any(parameter.dtype in (torch.int8, torch.uint8) for parameter in model.parameters()):
        raise ModelError(
            f"{type(model).__name__} has no linear layers that could be held in fewer bits: leave quantize out, or use --shard"
        )


def keep_layout(model: nn.Module) -> None:
    """Leave 4-bit weights as they were loaded.

    On a CPU with AVX-512 BF16 bitsandbytes lays them out anew at the first forward without a graph, for a kernel that rounds to
    bfloat16 and has no backward: gradients would be others from then on, and a width that is no multiple of 64 is an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
