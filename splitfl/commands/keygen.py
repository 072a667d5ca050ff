"""``splitfl keygen``: a key pair in a file of its own, and the line the operator needs."""

from __future__ import annotations

import argparse
from pathlib import Path

from splitfl.errors import KeyFileError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="where the secret key is written; must not exist")
    parser.add_argument("--name", default="", help="name of this client in the operator's list (default: the file's name)")


def run(args: argparse.Namespace) -> int:
    from splitfl.protocol.keys import write_identity

    path = Path(args.file)
    name = args.name or path.stem
    if any(character.isspace() or character == "#" for character in name):
        raise KeyFileError(f"the name {name!r} has a space or # in it; choose one word with --name")
    identity = write_identity(path)
    print(f"secret key: {path}  (keep it; it never leaves this machine)")
    print("give the operator this line for the file of authorised clients:\n")
    print(f"{identity.public} {name}")
    return 0
