"""What is looked at before a server loads anything: its operator's mistakes. Imports no transformers: the agent of several
processes looks too, and loads nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from splitfl.checkpoint import checkpoint_steps
from splitfl.config import RunConfig
from splitfl.errors import ConfigError, KeyFileError
from splitfl.protocol.keys import Identity, read_identity, write_identity
from splitfl.tensors import resolve_device

__all__ = ["check_before", "check_new", "layer_devices", "run_device", "server_identity"]


def check_before(config: RunConfig, *, device: torch.device | None = None) -> tuple[Path, torch.device]:
    """Look for mistakes; returns the file of admitted clients, and the device; ``device``: where that is settled already.

    Raises ConfigError.
    """
    return _authorized_file(config), device or run_device(config)


def check_new(out: Path) -> None:
    """Raises ConfigError where ``out`` is no place for a new run."""
    if checkpoint_steps(out):
        raise ConfigError(
            f"{out} holds the checkpoints of an earlier run, which a new one would push out: go on with it by --resume, or "
            "name the new one with --run or --out"
        )


def server_identity(config: RunConfig, may_make: bool = True) -> Identity:
    """The server's key pair: of the file the config names, or the run's own, made on first use.

    Raises KeyFileError where there is none and it is another's to make.
    """
    path = Path(config.identity or config.out_dir / "server.key")
    if path.exists():
        return read_identity(path)
    if not may_make:
        raise KeyFileError(f"{path} is not on this machine: all replicas have one key, so copy the file of replica 0 here")
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_identity(path)


def _authorized_file(config: RunConfig) -> Path:
    """The file of admitted clients. Raises ConfigError, with the mend, where there is none."""
    path = Path(config.authorized_clients or config.out_dir / "authorized_clients")
    if not path.exists():
        raise ConfigError(
            f"{path} does not exist, so nobody could join: put one line per client into it, its public key and a name "
            "(each client makes its key with `splitfl keygen`)"
        )
    return path


def run_device(config: RunConfig) -> torch.device:
    """Where hidden states go in and come out. Raises ConfigError where the machine has no such device."""
    devices = layer_devices(config)
    try:
        return devices[0] if devices else resolve_device(config.device)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def layer_devices(config: RunConfig) -> list[torch.device]:
    """The GPUs that this process's trunk is spread over, behind those of other replicas on this machine; none where it is not
    spread. Raises ConfigError.
    """
    if config.shard != "layers":
        return []
    if config.device not in ("auto", "cuda"):
        raise ConfigError(f"device = {config.device!r} is one device, and shard = layers takes several: leave it at auto")
    first = int(os.environ.get("LOCAL_RANK", 0)) * config.shard_size
    count = torch.cuda.device_count()
    if count < first + config.shard_size:
        raise ConfigError(
            f"shard = layers asks for {first + config.shard_size} GPUs, this machine has {count}: give a smaller --shard-size"
            + (", or start fewer replicas" if config.mode == "hierarchical" else "")
        )
    return [torch.device("cuda", first + number) for number in range(config.shard_size)]
