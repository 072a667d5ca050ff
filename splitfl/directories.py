"""Directories that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from splitfl.errors import CheckpointError

__all__ = ["write_directory_atomically"]


@contextmanager
def write_directory_atomically(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` to write into; flush it to disk and rename it to ``path`` on success.

    When the body raises, the temporary directory is removed and whatever was at ``path`` stays as it was. Raises
    ``CheckpointError`` where ``path`` exists and is not an empty directory, unless ``overwrite``: then the old
    directory is moved aside first and deleted after the new one is in place.
    """
    target = Path(path)
    occupied = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if occupied and not overwrite:
        raise CheckpointError(f"{target} exists already and is not empty: choose another directory or remove it first.")
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file, where a directory is to be written: choose another name.")
    if not target.parent.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        _flush_directory(target.parent.parent)
    temporary = _sibling(target, "tmp")
    try:
        yield temporary
        for directory, _, names in os.walk(temporary):
            for name in names:
                _flush(Path(directory) / name)
            _flush_directory(Path(directory))
        if target.exists():
            aside = _sibling(target, "old")
            os.replace(target, aside / target.name)
            os.replace(temporary, target)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(temporary, target)
        _flush_directory(target.parent)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def _sibling(target: Path, suffix: str) -> Path:
    # Not tempfile's: its directories are for the owner alone, a result has the mode any new directory has.
    path = target.parent / f".{target.name}.{secrets.token_hex(4)}.{suffix}"
    path.mkdir()
    return path


def _flush(file: Path) -> None:
    # Windows flushes only handles that were opened for writing.
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())


def _flush_directory(directory: Path) -> None:
    if os.name != "posix":  # Windows has no handle to a directory that could be flushed
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
