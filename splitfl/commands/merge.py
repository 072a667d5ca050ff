"""``splitfl merge``: ends and trunk together, as plain ``transformers`` and ``peft`` load them."""

from __future__ import annotations

import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ends", metavar="ENDS_DIR", help="exported ends of one client")
    parser.add_argument("trunk", metavar="TRUNK_DIR", help="exported trunk of the server")
    parser.add_argument("out", metavar="OUT_DIR", help="directory to write; must not exist")
    parser.add_argument("--full-weights", action="store_true", help="write a whole checkpoint instead of an adapter")
    parser.add_argument("--base", metavar="MODEL", help="the base model, where it lies elsewhere now")


def run(args: argparse.Namespace) -> int:
    from splitfl.adapters.merging import merge

    merge(args.ends, args.trunk, args.out, full_weights=args.full_weights, base=args.base)
    print(f"written: {args.out}")
    return 0
