"""A client's own data: files to rows, rows to tokens and targets, tokens to batches. Nothing here leaves the client."""

from client_ends.data.batching import Batches, collate, pad_token, split_holdout, target_count
from client_ends.data.readers import Examples, load_examples
from client_ends.data.tokenising import TokenizedDataset, tokenize

__all__ = [
    "Batches",
    "Examples",
    "TokenizedDataset",
    "collate",
    "load_examples",
    "pad_token",
    "split_holdout",
    "target_count",
    "tokenize",
]
