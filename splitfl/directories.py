"""Directories that appear whole or not at all."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from splitfl.errors import CheckpointError

__all__ = ["restore_set_aside", "write_directory_atomically"]

#: Of Linux's renameat2: names are relative to the working directory; both exist, and are swapped.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def write_directory_atomically(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` to write into; flush it to disk and rename it to ``path`` on success.

    When the body raises, the temporary directory is removed and whatever was at ``path`` stays as it was. Raises
    ``CheckpointError`` where ``path`` exists and is not an empty directory, unless ``overwrite``: then the two are swapped and
    the old one is deleted. Where the system cannot swap, the old one is moved aside first; a crash between the two renames leaves
    it there for :func:`restore_set_aside`.
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
        if not target.exists():
            os.replace(temporary, target)
        elif not _exchange(temporary, target):
            _put_in_place(temporary, target)
        _flush_directory(target.parent)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def restore_set_aside(folder: Path) -> None:
    """Give directories of ``folder`` back their names that a crash left aside while another was to take their place."""
    for old in folder.glob(".*.old/*"):
        if not (folder / old.name).exists():
            with suppress(OSError):  # another process may have been quicker
                os.replace(old, folder / old.name)


def _put_in_place(new: Path, target: Path) -> None:
    """Give ``new`` the name of ``target``, and delete what had it; where that is refused, all is as before."""
    aside = _sibling(target, "old")
    try:
        os.replace(target, aside / target.name)
        os.replace(new, target)
    except BaseException:
        with suppress(OSError):
            os.replace(aside / target.name, target)
        with suppress(OSError):
            aside.rmdir()  # not what could not be given its name back
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap what two names stand for, at once; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


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
