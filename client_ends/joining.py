"""A run joined to use its model, not to train it: what ``splitfl eval``, ``generate``, ``chat`` and ``proxy`` have in common."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from client_ends.kept import put_into
from client_ends.preparing import check_model, load_tokenizer, model_of

__all__ = ["joined"]


@contextlib.contextmanager
def joined(args: argparse.Namespace, face: Any, kept: Path | None = None, **extra: Any) -> Iterator[tuple[Any, Any]]:
    """The model of the run that ``args`` name (the flags for joining and for the machine), with the ends in ``kept`` if any, and
    its tokenizer; at the end the run is left.

    Raises:
        UserError: each one sentence with the mend.
    """
    check_model(args)
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    model = face.from_pretrained(
        args.model,
        args.trunk,
        args.identity,
        cut=args.cut,
        revision=args.revision,
        dtype=args.dtype,
        device=args.device,
        attn=args.attn,
        trust_remote_code=args.trust_remote_code,
        timeout=args.timeout,
        reconnect=args.reconnect,
        **extra,
    )
    try:
        terms = model.trunk.session.terms
        tokenizer = load_tokenizer(*model_of(args, terms), trust_remote_code=args.trust_remote_code)
        yield (put_into(model, kept, terms) if kept else model).eval(), tokenizer
    finally:
        model.close()
