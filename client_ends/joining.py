"""A run joined: for training, or, with its tokenizer and ends that were kept, to use its model (``splitfl eval``, ``generate``,
``chat``, ``proxy``).
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from client_ends.kept import kept_directory, put_into
from client_ends.preparing import load_tokenizer, model_of
from client_ends.settings import TrainSettings
from splitfl.libraries import quiet_libraries

__all__ = ["join", "joined"]


def join(face: Any, told: TrainSettings | argparse.Namespace, **more: Any) -> Any:
    """The model of the run that ``told`` names, as ``face``, on this machine as it says; ``more``: further arguments of
    ``face.from_pretrained``, whose errors it raises.
    """
    if told.threads:
        torch.set_num_threads(told.threads)
    return face.from_pretrained(
        told.model,
        told.trunk,
        told.identity,
        cut=told.cut,
        revision=told.revision,
        dtype=told.dtype,
        device=told.device,
        attn=told.attn,
        trust_remote_code=told.trust_remote_code,
        timeout=told.timeout,
        reconnect=told.reconnect,
        **more,
    )


@contextlib.contextmanager
def joined(args: argparse.Namespace, face: Any, **more: Any) -> Iterator[tuple[Any, Any]]:
    """For a command: the model of the run that ``args`` name (the flags for using one, and for the machine), with the kept ends
    that they name, if any, frozen, and its tokenizer; at the end the run is left. ``more``: as of :func:`join`.

    Raises:
        UserError: each one sentence with the mend.
    """
    kept = kept_directory(args.ends) if args.ends else None
    quiet_libraries()
    model = join(face, args, **more)
    try:
        terms = model.trunk.session.terms
        tokenizer = load_tokenizer(*model_of(args, terms), trust_remote_code=args.trust_remote_code)
        yield (put_into(model, kept, terms) if kept else model).eval().requires_grad_(False), tokenizer
    finally:
        model.close()
