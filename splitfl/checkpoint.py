"""Checkpoints: directories that exist whole or not at all, and that prove at loading that they are undamaged.

A run directory holds ``checkpoints/step-00000042/``; where each client has an adapter of its own,
``clients/NAME/checkpoints/step-00000042/`` too. Each checkpoint holds

- ``trainables.safetensors``: the trained tensors by their names in the full model; or, where they lie on several ranks,
  ``trainables/``, in files of each rank's own parts (:mod:`splitfl.shard_files`), beside further directories of that kind;
- ``checkpoint.json``: what the caller wants known (step, model, cut, ...), and size and SHA-256 of every other file;
- any further files the caller hands over as bytes: optimizer state, random state, data position.

Nothing here is pickled: nested state (an optimizer's, a generator's) is one safetensors file too (:mod:`splitfl.packed_state`),
so that loading a checkpoint can never run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from splitfl.directories import restore_set_aside, write_directory_atomically
from splitfl.disk_errors import said_if_unreadable, said_if_unwritable
from splitfl.errors import CheckpointError, NotReadable
from splitfl.packed_state import write_state
from splitfl.shard_files import read_whole

FORMAT = 1
TENSORS = "trainables.safetensors"
SHARDS = "trainables"
DESCRIPTION = "checkpoint.json"
_STEP = re.compile(r"step-(\d{8,})")
_CLIENT = re.compile(r"[A-Za-z0-9._-]{1,64}")


# --- One checkpoint. --------------------------------------------------------------------------------------------------


def save_checkpoint(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
    *,
    write: Callable[[Path], Mapping[str, str]] | None = None,
) -> None:
    """Write one checkpoint directory, atomically; an older checkpoint of the same name is replaced.

    ``write``: writes shards in place of ``tensors``, into directories of the one it is given, which is not yet where it will be;
    returns the SHA-256 of each file by its path there.

    ``tensors``: any device, any dtype, no two sharing memory. ``meta``: plain JSON values. ``extra``: content by
    file name; bytes as they are, anything else as :func:`~splitfl.packed_state.write_state` has it.

    Raises ``NotWritten`` where the system refuses (the disk is full, say); then nothing of it stays, and what was there stands.
    """
    for name in extra or {}:
        if name in (TENSORS, DESCRIPTION) or Path(name).name != name or name.startswith("."):
            raise ValueError(f"{name!r} cannot be the name of a further file in a checkpoint")
    # As JSON gives it back (tuples as lists, every key a string): so the digest is that of what will be read.
    meta = json.loads(json.dumps(meta, allow_nan=False))
    text = json.dumps(meta, allow_nan=False, sort_keys=True)
    with said_if_unwritable(f"The checkpoint {directory}"), write_directory_atomically(directory, overwrite=True) as temporary:
        digests = dict(write(temporary)) if write is not None else {}
        if write is None:
            save_tensors(temporary / TENSORS, tensors)
        for name, content in (extra or {}).items():
            if isinstance(content, bytes):
                (temporary / name).write_bytes(content)
            else:
                write_state(temporary / name, content)
        digests |= {file.name: file_digest(file) for file in temporary.iterdir() if file.is_file()}
        files = {name: {"bytes": (temporary / name).stat().st_size, "sha256": digest} for name, digest in sorted(digests.items())}
        description = {"format": FORMAT, "meta": meta, "files": files, "meta_sha256": _text_digest(text)}
        (temporary / DESCRIPTION).write_text(json.dumps(description, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load_checkpoint(
    directory: str | os.PathLike[str], *, shards: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, bytes]]:
    """Read one checkpoint directory: ``(tensors, meta, extra)`` as :func:`save_checkpoint` was given them.

    Of a checkpoint in shards the tensors are made whole, or, without ``shards``, left where they are.

    Raises ``CheckpointError`` where a file is missing, of another size, or of another digest than at saving; ``NotReadable``
    where nothing says that it is damaged, and yet it cannot be read.
    """
    directory = Path(directory)
    with said_if_unreadable(f"The checkpoint {directory}"):
        return _load(directory, shards)


def _load(directory: Path, shards: bool) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, bytes]]:
    meta, files = _read_description(directory)
    extra: dict[str, bytes] = {}
    for name, stated in files.items():
        file = directory / name
        if not file.is_file():
            raise CheckpointError(f"The checkpoint {directory} is incomplete, {name} is missing: use another one.")
        if file.stat().st_size != stated["bytes"] or file_digest(file) != stated["sha256"]:
            raise CheckpointError(f"The checkpoint {directory} is damaged, {name} is not as it was saved: use another one.")
        if name != TENSORS and "/" not in name:
            extra[name] = file.read_bytes()
    if TENSORS in files:
        return load_tensors(directory / TENSORS), meta, extra
    return read_whole(directory / SHARDS) if shards else {}, meta, extra


def in_shards(directory: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint's tensors were written in shards."""
    return (Path(directory) / SHARDS).is_dir()


def load_meta(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Only the ``meta`` of a checkpoint: cheap, no tensor is read. Raises as :func:`load_checkpoint` does."""
    with said_if_unreadable(f"The checkpoint {directory}"):
        return _read_description(Path(directory))[0]


def _read_description(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    file = directory / DESCRIPTION
    if not file.is_file():
        raise CheckpointError(f"{directory} is no checkpoint, it has no {DESCRIPTION}: name a run or a checkpoint directory.")
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        if description["format"] != FORMAT:
            raise NotReadable(
                f"The checkpoint {directory} has format {description['format']}, this version reads {FORMAT}: "
                "use the splitfl version that wrote it."
            )
        meta, files = description["meta"], description["files"]
        intact = description["meta_sha256"] == _text_digest(json.dumps(meta, allow_nan=False, sort_keys=True))
        names_ok = all(_stays_inside(name) and entry.keys() >= {"bytes", "sha256"} for name, entry in files.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"The checkpoint {directory} is damaged, {DESCRIPTION} cannot be read: use another one.") from error
    has_tensors = TENSORS in files or any(name.startswith(f"{SHARDS}/") for name in files)
    if not intact or not names_ok or not has_tensors:
        raise CheckpointError(f"The checkpoint {directory} is damaged, {DESCRIPTION} is not as it was saved: use another one.")
    return meta, files


def _stays_inside(name: str) -> bool:
    """Whether it is a file of the checkpoint's, or of a directory in it."""
    parts = name.split("/")
    return len(parts) <= 2 and all(Path(part).name == part and part.strip(".") for part in parts)


# --- The checkpoints of a run. ----------------------------------------------------------------------------------------


def checkpoint_directory(run_dir: str | os.PathLike[str], step: int) -> Path:
    """Where the checkpoint of ``step`` of a run lies."""
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}"


def put_aside(directory: Path, why: str) -> Path:
    """Rename a checkpoint that nothing is to go on from; returns its place. One that was put there before is deleted.

    Raises ``NotWritten`` where the system refuses.
    """
    place = directory.with_name(f"{why}-{directory.name}")
    shutil.rmtree(place, ignore_errors=True)
    with said_if_unwritable(f"The new name of the checkpoint {directory}, {place.name},"):
        os.replace(directory, place)
    return place


def mend_checkpoints(run_dir: str | os.PathLike[str]) -> None:
    """Undo what a crash has interrupted: a checkpoint that was being written anew is as it was. To be called at the start, before
    anybody asks which checkpoints there are, and while nobody writes any.
    """
    for folder in (Path(run_dir) / "checkpoints", *_folders_of_clients(run_dir)):
        restore_set_aside(folder)


def _folders_of_clients(run_dir: str | os.PathLike[str]) -> list[Path]:
    return sorted((Path(run_dir) / "clients").glob("*/checkpoints"))


def checkpoint_steps(run_dir: str | os.PathLike[str]) -> list[int]:
    """The steps a run has checkpoints of, ascending; empty where it has none. Raises ``CheckpointError`` where the system does
    not say what is there.
    """
    folder = Path(run_dir) / "checkpoints"
    with said_if_unreadable(f"The directory {folder}"):
        if not folder.is_dir():
            return []
        matches = (_STEP.fullmatch(entry.name) for entry in folder.iterdir() if (entry / DESCRIPTION).is_file())
        return sorted(int(match[1]) for match in matches if match)


def newest_checkpoint(run_dir: str | os.PathLike[str]) -> Path | None:
    """The checkpoint of the highest step of a run, or None where it has none."""
    steps = checkpoint_steps(run_dir)
    return checkpoint_directory(run_dir, steps[-1]) if steps else None


def prune_checkpoints(
    run_dir: str | os.PathLike[str], keep: int, *, among: Callable[[int], bool] = lambda step: True
) -> list[int]:
    """Delete all but the newest ``keep`` checkpoints of a run (of steps ``among`` which to choose), undone ones that are older
    than all that are left, and what interrupted writes left; return the steps gone.

    Not to be called while another thread writes a checkpoint of the same run.
    """
    if keep < 1:
        raise ValueError("at least one checkpoint has to be kept")
    restore_set_aside(Path(run_dir) / "checkpoints")
    gone = [step for step in checkpoint_steps(run_dir) if among(step)][:-keep]
    for step in gone:
        shutil.rmtree(checkpoint_directory(run_dir, step))
    folder = Path(run_dir) / "checkpoints"
    oldest = min(checkpoint_steps(run_dir), default=0)
    undone = [entry for entry in folder.glob("undone-*") if (m := _STEP.search(entry.name)) and int(m[1]) < oldest]
    for leftover in (*undone, *folder.glob(".step-*")):
        shutil.rmtree(leftover, ignore_errors=True)
    return gone


def client_directory(run_dir: str | os.PathLike[str], client: str) -> Path:
    """Where a run keeps the adapter of one client: it holds checkpoints as a run's directory does.

    Raises ``CheckpointError`` for a name that no client can have.
    """
    if not _CLIENT.fullmatch(client) or not client.strip("."):
        raise CheckpointError(
            f"no client is called {client[:64]!r}: names have 1 to 64 letters, digits, dots, dashes or underscores."
        )
    return Path(run_dir) / "clients" / client


def clients_of(run_dir: str | os.PathLike[str]) -> list[str]:
    """The clients whose own adapters a run has kept, sorted."""
    folder = Path(run_dir) / "clients"
    return sorted(entry.name for entry in folder.iterdir() if checkpoint_steps(entry)) if folder.is_dir() else []


def prune_client_checkpoints(run_dir: str | os.PathLike[str]) -> None:
    """Delete those checkpoints of clients that none of the run's own names any more (in ``clients`` of its ``meta``), and what
    interrupted writes left beside them. While one of those cannot be read nothing is deleted: nobody knows what it names.

    Not to be called while another thread writes a checkpoint of the same run.
    """
    folders = _folders_of_clients(run_dir)
    if not folders:
        return
    named: set[tuple[str, int]] = set()
    try:
        for step in checkpoint_steps(run_dir):
            named |= set((load_meta(checkpoint_directory(run_dir, step)).get("clients") or {}).items())
    except CheckpointError:
        return
    for folder in folders:
        restore_set_aside(folder)
        own = folder.parent
        for step in checkpoint_steps(own):
            if (own.name, step) not in named:
                shutil.rmtree(checkpoint_directory(own, step))
        for leftover in folder.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)


# --- Files. -----------------------------------------------------------------------------------------------------------


def save_tensors(file: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file of ``tensors``, in sorted order; views are made contiguous."""
    plain = {name: tensors[name].detach().contiguous() for name in sorted(tensors)}
    save_file(plain, file, metadata={"format": "pt"} | (metadata or {}))


def load_tensors(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises ``CheckpointError`` where it is missing or damaged."""
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors ({error}): the file is missing or damaged.") from error


def file_digest(file: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, hexadecimal, read in pieces."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


__all__ = [
    "SHARDS",
    "checkpoint_directory",
    "checkpoint_steps",
    "client_directory",
    "clients_of",
    "file_digest",
    "in_shards",
    "load_checkpoint",
    "load_meta",
    "load_tensors",
    "mend_checkpoints",
    "newest_checkpoint",
    "prune_checkpoints",
    "prune_client_checkpoints",
    "put_aside",
    "save_checkpoint",
    "save_tensors",
]
