"""What the tests of the deployment files share: linters, the Dockerfile's lines, command lines as splitfl takes them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from server_trunk.command import config_from
from splitfl.cli import build_parser
from splitfl.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = DEPLOY / "Dockerfile"


def linter(name: str, *arguments: object) -> str:
    """Run one; what it printed."""
    beside = Path(sys.executable).with_name(name)
    command = str(beside) if beside.exists() else shutil.which(name)
    if command is None:
        pytest.skip(f"{name} is not installed; the dev extra has those linters that pip has")
    done = subprocess.run([command, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def instructions(word: str) -> list[str]:
    """The Dockerfile's lines that begin with a word, without it."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    return [line.removeprefix(word).strip() for line in map(str.strip, text.splitlines()) if line.startswith(f"{word} ")]


def serve_config(words: list[str], *, file: str = "") -> RunConfig:
    """The config that a ``splitfl serve`` command line means; ``file`` stands for what it gives as ``--config``."""
    args = build_parser(words).parse_args(words)
    assert args.command == "serve"
    if args.config:
        args.config = file
    return config_from(args)
