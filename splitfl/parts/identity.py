"""Which model this is: digests of the config and of the weight files, so that two sides can tell theirs apart.

Either side may lack the shards it does not hold, on disk or because they were never downloaded; digests of files of the
hub are taken from the hub's own records. What both sides know is compared.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitfl.errors import ModelError, RemoteProtocolError
from splitfl.parts.hub import INDEX, SINGLE, Checkpoint, open_checkpoint, read_json

# Said of a model by the library that wrote it or the task it is used for, not by its weights.
VOLATILE = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "dtype",
    "id2label",
    "label2id",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ModelIdentity:
    """SHA-256 digests in hex. ``config_digest``: of the config without what changes from one program to another.

    ``index_digest``: of the map from tensors to shards, None for a single file. ``shards``: file name to digest, of
    those this side knows. ``revision``: the hub's commit, None for a local directory.
    """

    config_digest: str
    index_digest: str | None
    shards: dict[str, str]
    revision: str | None = None

    def to_plain(self) -> dict[str, Any]:
        """As strings, dicts and None alone, for msgpack and JSON."""
        return {
            "config": self.config_digest,
            "index": self.index_digest,
            "shards": dict(sorted(self.shards.items())),
            "revision": self.revision,
        }

    @classmethod
    def from_plain(cls, plain: Any) -> ModelIdentity:
        """The inverse, of what a peer sent. Raises RemoteProtocolError where it is no identity."""
        if not isinstance(plain, dict) or plain.keys() != {"config", "index", "shards", "revision"}:
            raise RemoteProtocolError("a model identity has the fields config, index, shards and revision")
        config, index, shards, revision = plain["config"], plain["index"], plain["shards"], plain["revision"]
        if not isinstance(shards, dict) or not all(isinstance(name, str) and len(name) < 256 for name in shards):
            raise RemoteProtocolError("the shards of a model identity are a map of file names")
        for digest in (config, *shards.values(), *([] if index is None else [index])):
            if not isinstance(digest, str) or _DIGEST.fullmatch(digest) is None:
                raise RemoteProtocolError("a digest in a model identity is not 64 hex digits")
        if revision is not None and (not isinstance(revision, str) or len(revision) > 256):
            raise RemoteProtocolError("the revision of a model identity is no short text")
        return cls(config, index, dict(shards), revision)


def compare(mine: ModelIdentity, theirs: ModelIdentity) -> str | None:
    """None where the two may be the same model; else one sentence that says what differs, from ``mine``'s side."""
    revisions = (
        f" (here revision {mine.revision[:12]}, there {theirs.revision[:12]})"
        if mine.revision and theirs.revision and mine.revision != theirs.revision
        else ""
    )
    if mine.config_digest != theirs.config_digest:
        return f"the two sides' config.json differ{revisions}: another model, or saved anew; use the same files on both sides"
    if (mine.index_digest is None) != (theirs.index_digest is None):
        return f"one side has the weights in one file and the other in several{revisions}: use the same files on both"
    if mine.index_digest != theirs.index_digest:
        return f"the two sides' {INDEX} differ{revisions}: their weights are divided among files in different ways"
    differing = sorted(name for name in mine.shards.keys() & theirs.shards.keys() if mine.shards[name] != theirs.shards[name])
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        return f"the weights in {differing[0]}{more} differ{revisions}: the two sides hold different models"
    return None


def model_identity(path: str | os.PathLike[str], revision: str | None = None) -> ModelIdentity:
    """The identity of a model directory or hub id. Hashes local shards once (results are kept); downloads none.

    Raises ModelError where there is no such model or no weights.
    """
    return checkpoint_identity(open_checkpoint(path, revision))


def checkpoint_identity(checkpoint: Checkpoint) -> ModelIdentity:
    """The identity of an open checkpoint; see ``model_identity``."""
    config = digest_of_json(without_volatile(read_json(checkpoint.require("config.json"))))
    index = None
    names = [SINGLE]
    if checkpoint.sharded:
        weight_map = read_json(checkpoint.require(INDEX))["weight_map"]
        index, names = digest_of_json(weight_map), sorted(set(weight_map.values()))
    known = dict(checkpoint.published_digests(names))
    for name in names:
        file = checkpoint.local(name) if name not in known else None
        if file is not None:
            known[name] = file_digest(file)
    if not known and checkpoint.directory is not None:
        raise ModelError(f"{checkpoint.path} holds no weights: none of {', '.join(names[:3])} is there")
    return ModelIdentity(config, index, known, checkpoint.commit)


def without_volatile(config: Any) -> Any:
    """A config, nested ones included, without the fields of ``VOLATILE``."""
    if isinstance(config, dict):
        return {key: without_volatile(value) for key, value in config.items() if key not in VOLATILE}
    if isinstance(config, list):
        return [without_volatile(value) for value in config]
    return config


def digest_of_json(value: Any) -> str:
    """SHA-256 of the value's canonical JSON: sorted keys, no spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file in hex, streamed; remembered under path, size and modification time in the user's cache."""
    resolved = path.resolve()
    # Files in the hub's cache are named by their digest.
    if resolved.parent.name == "blobs" and _DIGEST.fullmatch(resolved.name):
        return resolved.name
    stat = resolved.stat()
    stamp = f"{stat.st_size}-{stat.st_mtime_ns}"
    known = _read_cache()
    entry = known.get(str(resolved))
    if isinstance(entry, dict) and entry.get("stamp") == stamp and isinstance(entry.get("sha256"), str):
        found: str = entry["sha256"]
        return found
    with resolved.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _write_cache({**_read_cache(), str(resolved): {"stamp": stamp, "sha256": digest}})
    return digest


def cache_directory() -> Path:
    """Where this user's programs keep what can be computed again, by the platform's custom."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "splitfl"


def _read_cache() -> dict[str, Any]:
    try:
        found = json.loads((cache_directory() / "digests.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_cache(entries: dict[str, Any]) -> None:
    """Replaces the cache file whole, so that a reader never sees half of it. Where it cannot be written, it is not."""
    directory = cache_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=directory, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(entries, file)
        os.replace(name, directory / "digests.json")
    except OSError:
        return
