"""``splitfl generate`` and ``splitfl chat``: the run's model writes, on this machine's terminal. Text stays here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from client_ends.command import add_machine_arguments, add_using_arguments, check_joining
from splitfl.errors import ConfigError

__all__ = ["add_arguments", "check", "options", "run", "using"]


def add_arguments(parser: argparse.ArgumentParser, *, prompt: bool = True) -> None:
    """``prompt``: with the text to go on from as an argument."""
    if prompt:
        parser.add_argument("prompt", nargs="?", metavar="TEXT", help="what to go on from (default: what comes in)")
    add_using_arguments(parser)

    writing = parser.add_argument_group("writing")
    writing.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="the longest answer (256)")
    writing.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0: the likeliest token each time (0)")
    writing.add_argument("--top-k", type=int, default=50, metavar="N", help="with a temperature: of the N likeliest (50)")
    writing.add_argument("--top-p", type=float, default=1.0, metavar="X", help="with a temperature: of those with this share (1)")
    writing.add_argument("--seed", type=int, default=0, metavar="N", help="with a temperature: what is drawn")
    writing.add_argument(
        "--lookup", type=int, default=0, metavar="N", help="propose up to N tokens from the text before: fewer round trips (0)"
    )
    add_machine_arguments(parser.add_argument_group("this machine"))


def check(args: argparse.Namespace) -> None:
    """Raises ConfigError, KeyFileError."""
    least = {"max_new_tokens": 1, "temperature": 0, "top_k": 1, "lookup": 0, "seed": 0}
    for name, low in least.items():
        if getattr(args, name) < low:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {low}")
    if not 0 < args.top_p <= 1:
        raise ConfigError("--top-p must lie in (0, 1]")
    check_joining(args)


def run(args: argparse.Namespace) -> int:
    check(args)
    prompt = args.prompt if args.prompt is not None else sys.stdin.read()
    needs = "--lookup needs one: leave it out" if args.lookup else ""
    return using(args, lambda model, tokenizer: _write(args, model, tokenizer, prompt), needs)


def using(args: argparse.Namespace, work: Callable[[Any, Any], None], needs_cache: str = "") -> int:
    """Join the run, ``work(model, tokenizer)``, and leave it. ``needs_cache``: what does, and what to do where the trunk keeps
    none.

    Raises:
        UserError: each one sentence with the mend.
    """
    import torch

    from client_ends.joining import joined
    from client_ends.model import SplitModelForCausalLM
    from splitfl.parts.ends import find_ends

    torch.manual_seed(args.seed)
    with joined(args, SplitModelForCausalLM) as (model, tokenizer):
        ends: Any = find_ends(model)
        if needs_cache and not ends.trunk.session.terms["cache_tokens"]:
            raise ConfigError(f"the trunk keeps no key-value caches in this run, and {needs_cache}, or ask the operator for some")
        work(model, tokenizer)
    return 0


def options(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """What ``generate()`` is told."""
    from client_ends.data import pad_token

    told: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "pad_token_id": pad_token(tokenizer)}
    told["do_sample"] = args.temperature > 0
    if args.temperature > 0:
        told |= {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    if args.lookup:
        told["prompt_lookup_num_tokens"] = args.lookup
    return told


def _write(args: argparse.Namespace, model: Any, tokenizer: Any, prompt: str) -> None:
    from transformers import TextStreamer

    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    if not ids.shape[1]:
        raise ConfigError("there is nothing to go on from: give a text")
    streamer: Any = TextStreamer(tokenizer, skip_special_tokens=True)
    model.generate(ids, streamer=streamer, **options(args, tokenizer))
