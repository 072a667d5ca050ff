"""Where a model's files are: a local directory or a repository of the hub, seen alike.

Nothing is downloaded but the config until somebody asks for shards by name, and then those alone.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from splitfl.errors import ModelError, first_line

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Read by from_pretrained beside the weights; what a model lacks is skipped.
SIDE_FILES = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a safetensors header tells it: dtype name ("BF16"), shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass
class Checkpoint:
    """The files of one model at one revision.

    ``path``: as the user gave it. ``directory``: a local directory, or None for the hub. ``commit``: the hub's commit
    hash. ``weight_map``: tensor name to shard file name; from the index, or for a single file from its header.
    """

    path: str
    directory: Path | None
    commit: str | None
    _weight_map: dict[str, str] | None = None
    _files: dict[str, Path] = field(default_factory=dict)

    @property
    def sharded(self) -> bool:
        """Whether the weights lie in several files. As in from_pretrained, a single file is preferred to an index."""
        if self.directory is not None:
            return not (self.directory / SINGLE).is_file() and (self.directory / INDEX).is_file()
        # Asked in the other order, for to ask for the single file is to download it.
        return self.find(INDEX) is not None

    def find(self, name: str) -> Path | None:
        """The local path of a file, downloaded first if it is on the hub; None where the model has no such file."""
        if name in self._files:
            return self._files[name]
        if self.directory is not None:
            found: Path | None = self.directory / name
            if found is not None and not found.is_file():
                return None
        else:
            found = _download(self.path, name, self.commit)
        if found is not None:
            self._files[name] = found
        return found

    def local(self, name: str) -> Path | None:
        """The local path of a file that is here already; None where it is not. Downloads nothing."""
        if name in self._files or self.directory is not None:
            return self.find(name)
        return _cached(self.path, name, self.commit)

    def published_digests(self, names: list[str]) -> dict[str, str]:
        """SHA-256 in hex of weight files as the hub records them; empty for a directory, or if it cannot be asked."""
        if self.directory is not None:
            return {}
        return {name: digest for name, digest in _published(self.path, self.commit).items() if name in names}

    def require(self, name: str) -> Path:
        """Like ``find``. Raises ModelError where the model has no such file."""
        found = self.find(name)
        if found is None:
            raise ModelError(f"{self.path} lacks {name}: copy or download this file of the model")
        return found

    @property
    def weight_map(self) -> dict[str, str]:
        if self._weight_map is None:
            if self.sharded:
                self._weight_map = dict(read_json(self.require(INDEX))["weight_map"])
            elif (single := self.find(SINGLE)) is not None:
                self._weight_map = dict.fromkeys(read_header(single), SINGLE)
            else:
                raise ModelError(
                    f"{self.path} holds no safetensors weights (neither {SINGLE} nor {INDEX}): save the model with "
                    "save_pretrained, which writes them"
                )
        return self._weight_map

    @property
    def shards(self) -> list[str]:
        return sorted(set(self.weight_map.values()))

    @contextmanager
    def view(self, keep: set[str]) -> Iterator[Path]:
        """A temporary directory from which ``from_pretrained`` reads the tensors ``keep``, opening only their shards.

        It holds the config files and an index whose entries are absolute paths of the shards: no links, no copies.
        """
        needed = {key: shard for key, shard in self.weight_map.items() if key in keep}
        for shard in sorted(set(needed.values())):
            read_header(self.require(shard))  # a damaged file is better named here than deep in the loader
        # Absolute but not resolved: in the hub's cache a shard is a link to a blob whose name lacks the suffix.
        paths = {shard: os.path.abspath(self.require(shard)) for shard in sorted(set(needed.values()))}
        with tempfile.TemporaryDirectory(prefix="splitfl-") as name:
            directory = Path(name)
            for side in SIDE_FILES:
                source = self.find(side)
                if source is not None:
                    (directory / side).write_bytes(source.read_bytes())
            index = {"metadata": {}, "weight_map": {key: paths[shard] for key, shard in needed.items()}}
            (directory / INDEX).write_text(json.dumps(index), encoding="utf-8")
            yield directory


def open_checkpoint(path: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """The files of a model: ``path`` is a local directory or a hub id. Raises ModelError if it is neither."""
    text = os.fspath(path)
    if os.path.isdir(text):
        directory = Path(text)
        if not (directory / "config.json").is_file():
            adapter = (directory / "adapter_config.json").is_file()
            raise ModelError(
                f"{text} is a PEFT adapter, not a model: give the base model it was trained on"
                if adapter
                else f"{text} holds no config.json, so it is not a Hugging Face model directory"
            )
        return Checkpoint(text, directory, None)
    if text.startswith((".", "/", "~")) or os.sep * 2 in text or text.count("/") > 1 or "\\" in text:
        raise ModelError(f"{text} is no directory: give a model directory or a hub id such as owner/name")
    return Checkpoint(text, None, _resolve(text, revision))


def read_json(path: Path) -> Any:
    """A JSON file. Raises ModelError where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is damaged: it is not JSON ({error})") from error


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors a safetensors file holds, from its header alone (eight length bytes, then JSON).

    Raises ModelError where the file is cut short or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, 100_000_000):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {
            name: TensorInfo(entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
            for name, entry in header.items()
        }
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + length + end > size:
            raise ValueError("it is cut short")
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    return found


def _resolve(repo: str, revision: str | None) -> str:
    """The commit a revision names, from the hub or, offline, its cache: by fetching the config at that revision."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        config = hf_hub_download(repo, "config.json", revision=revision)
    except HFValidationError as error:
        raise ModelError(f"{repo} is neither a directory nor a hub id such as owner/name") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(f"{repo} is no directory, and the hub cannot be reached nor does its cache hold it") from error
    except EntryNotFoundError as error:
        raise ModelError(f"{repo} on the hub holds no config.json, so it is not a Hugging Face model") from error
    except HfHubHTTPError as error:
        at = f" at revision {revision}" if revision else ""
        raise ModelError(f"the hub has no model {repo}{at}, or asks for a login ({first_line(error)})") from error
    except OSError as error:
        raise ModelError(f"the config of {repo} cannot be fetched ({first_line(error)})") from error
    return Path(config).parent.name


def _download(repo: str, name: str, commit: str | None) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, name, revision=commit))
    except LocalEntryNotFoundError as error:
        raise ModelError(f"{name} of {repo} is not in the cache and cannot be fetched ({first_line(error)})") from error
    except EntryNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"{name} of {repo} cannot be downloaded ({first_line(error)})") from error


def _cached(repo: str, name: str, commit: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name, revision=commit)
    return Path(found) if isinstance(found, str) else None


def _published(repo: str, commit: str | None) -> dict[str, str]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        info = HfApi().model_info(repo, revision=commit, files_metadata=True)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return {}
    return {file.rfilename: file.lfs.sha256 for file in info.siblings or () if file.lfs is not None}
