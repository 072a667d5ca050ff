"""Parameter names as the full, unwrapped model has them.

A part keeps the full model's names by construction. PEFT adds to them: ``base_model.model.`` in front, ``.base_layer``
for the wrapped layer, the adapter's own name (``default``) inside. Checkpoints, the LoRA initialisation and merging
need names that are the same on both sides and in the full model, so PEFT's additions are taken off here and only here.
"""

from __future__ import annotations

import re

ADAPTER = "default"
PEFT_PREFIX = "base_model.model."
_LORA = re.compile(r"\.(lora_A|lora_B)\.[^.]+\.")
_LORA_TENSOR = re.compile(r"(?P<module>.+)\.(?P<which>lora_A|lora_B)\.weight")
_SAVED_MODULE = re.compile(r"\.modules_to_save\.[^.]+\.")


def full_name(name: str) -> str:
    """``base_model.model.model.layers.0.q_proj.lora_A.default.weight`` -> ``model.layers.0.q_proj.lora_A.weight``."""
    name = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
    name = _SAVED_MODULE.sub(".", name)
    return _LORA.sub(r".\1.", name)


def lora_module(name: str) -> str | None:
    """The module a LoRA tensor with this full name belongs to; None for a tensor that is not LoRA's."""
    match = _LORA_TENSOR.fullmatch(name)
    return match["module"] if match else None
