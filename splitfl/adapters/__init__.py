"""What trains in a part of a model, and what becomes of it: LoRA, full weights, results, merging."""

from splitfl.adapters.lora import attach_lora
from splitfl.adapters.merging import merge
from splitfl.adapters.names import full_name
from splitfl.adapters.results import describe_part, export_part, read_part, save_part
from splitfl.adapters.trainables import (
    Trainables,
    classification_head,
    load_trainables,
    named_trainables,
    set_trainable,
)
from splitfl.config import LoraSettings

__all__ = [
    "LoraSettings",
    "Trainables",
    "attach_lora",
    "classification_head",
    "describe_part",
    "export_part",
    "full_name",
    "load_trainables",
    "merge",
    "named_trainables",
    "read_part",
    "save_part",
    "set_trainable",
]
