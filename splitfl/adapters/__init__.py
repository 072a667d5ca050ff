"""What trains in a part of a model, and what becomes of it: LoRA, full weights, results, merging."""

from splitfl.adapters.lora import attach_lora
from splitfl.adapters.names import full_name
from splitfl.adapters.trainables import Trainables, classification_head, named_trainables, set_trainable
from splitfl.config import LoraSettings

__all__ = [
    "LoraSettings",
    "Trainables",
    "attach_lora",
    "classification_head",
    "full_name",
    "named_trainables",
    "set_trainable",
]
