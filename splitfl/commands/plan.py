"""``splitfl plan``: what each side of a cut holds and sends, before anything is loaded."""

from __future__ import annotations

import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="directory or hub id")
    parser.add_argument("--cut", default="1:1", metavar="A:B", help="input and output blocks that stay with the client")
    parser.add_argument("--revision", metavar="REV", help="hub revision")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with the checkpoint")


def run(args: argparse.Namespace) -> int:
    from splitfl.parts.plan import plan

    print(plan(args.model, args.cut, revision=args.revision, trust_remote_code=args.trust_remote_code).render())
    return 0
