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
    from splitfl.protocol.keys import public_path, write_identity

    path = Path(args.file)
    name = args.name or path.stem
    if any(character.isspace() or character == "#" for character in name):
        raise KeyFileError(f"the name {name!r} has a space or # in it; choose one word with --name")
    identity = write_identity(path)
    line = f"{identity.public} {name}"
    public_path(path).write_text(line + "\n", encoding="utf-8")
    print(f"secret key: {path}  (keep it; it never leaves this machine)")
    print(f"give the operator this line for the file of authorised clients (it is in {public_path(path)} too):\n")
    print(line)
    return 0
