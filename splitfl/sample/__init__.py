"""What a demonstration needs, made on the spot without a download: a small model, its tokenizer, real English text."""

from splitfl.sample.model import build_sample_model
from splitfl.sample.text import sample_text, write_sample_shards

__all__ = ["build_sample_model", "sample_text", "write_sample_shards"]
