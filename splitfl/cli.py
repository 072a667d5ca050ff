"""The ``splitfl`` command. Each subcommand is one module, imported only when it runs: ``--help`` must not wait for torch."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from splitfl import __version__
from splitfl.errors import SplitflError

__all__ = ["build_parser", "main"]

#: Command: (its module, with `add_arguments(parser)` and `run(args) -> exit code`; one line of help). By name, not by import:
#: the common ground imports neither side.
COMMANDS: dict[str, tuple[str, str]] = {
    "keygen": ("splitfl.commands.keygen", "make a key pair"),
    "plan": ("splitfl.commands.plan", "what each side of a cut holds and sends, before anything is loaded"),
    "serve": ("server_trunk.command", "host the trunk of a model"),
    "train": ("client_ends.command", "join a run and train on your own data"),
    "eval": ("client_ends.eval_command", "how good a run's model is: on a file of your own, or on tasks of lm-eval"),
    "generate": ("client_ends.generate_command", "have a run's model write on from a text of your own"),
    "chat": ("client_ends.chat_command", "talk with a run's model; text stays on this machine"),
    "proxy": ("client_ends.proxy_command", "an OpenAI-compatible endpoint to a run's model, on this machine"),
    "doctor": ("client_ends.doctor", "check address, keys, clock, versions and model of a join string"),
    "export": ("splitfl.commands.export", "write what a run trained as a portable part"),
    "merge": ("splitfl.commands.merge", "join ends and trunk into one PEFT adapter or full weights"),
    "simulate": ("benchmarks.simulate", "the server and all clients of a run in this process, for research"),
    "log": ("splitfl.commands.log", "what befell a run: who joined, left, was refused or dropped, and why"),
    "top": ("splitfl.commands.top", "live numbers of a run, in the terminal"),
    "bench": ("benchmarks.modes", "which mode for this machine: serial, client-batching and hierarchical, measured"),
    "demo": ("benchmarks.demo", "three clients and a server train one model on this machine, compared with central training"),
}


def build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for these arguments: it knows all commands, and the flags of the one that they name."""
    parser = argparse.ArgumentParser(
        prog="splitfl",
        description="Fine-tune one language model together: text, labels and loss stay with each client.",
    )
    parser.add_argument("--version", action="version", version=f"splitfl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == chosen:
            importlib.import_module(module).add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. A SplitflError ends it with one sentence and no traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser(arguments).parse_args(arguments)
    try:
        return int(importlib.import_module(COMMANDS[args.command][0]).run(args))
    except SplitflError as error:
        print(f"splitfl {args.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"splitfl {args.command}: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
