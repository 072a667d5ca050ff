"""``splitfl export``: what a run trained, as a portable part: the ends' on a client, the trunk's on the server."""

from __future__ import annotations

import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN_DIR", help="a run's directory, or one of its checkpoints")
    parser.add_argument("out", metavar="OUT_DIR", help="directory to write; must not exist")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step (default: the newest)")
    parser.add_argument("--client", metavar="NAME", help="whose adapter, where each client of the run has its own")


def run(args: argparse.Namespace) -> int:
    from splitfl.adapters.results import export_part

    export_part(args.run, args.out, step=args.step, client=args.client)
    print(f"written: {args.out}")
    return 0
