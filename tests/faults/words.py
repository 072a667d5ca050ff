"""The command lines that fault tests and soaks start a server and its clients with, and the keys these name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from splitfl.protocol.keys import write_identity

__all__ = ["flags", "serve", "write_keys"]


def write_keys(work: Path, names: list[str]) -> dict[str, Path]:
    """The clients' key files by name; the server's, and its list of them, lie beside."""
    keys = {name: work / f"{name}.key" for name in names}
    lines = [f"{write_identity(key).public} {name}" for name, key in keys.items()]
    (work / "authorized_clients").write_text("\n".join(lines) + "\n")
    write_identity(work / "server.key")
    return keys


def serve(work: Path, model: str, ports: tuple[int, int], words: Mapping[str, Any], *bare: str) -> list[str]:
    """``splitfl`` with what it takes to serve ``model`` to those that :func:`write_keys` made; ``words`` are this run's own."""
    control, data = ports
    common = {
        "out": work / "server",
        "identity": work / "server.key",
        "authorized-clients": work / "authorized_clients",
        "bind": f"127.0.0.1:{control}",
        "data-port": data,
        "device": "cpu",
        "trainables": "full",
        "lr": 1e-3,
    }
    return ["serve", model, *flags(common | words), "--resume-if-any", *bare]


def flags(words: Mapping[str, Any]) -> list[str]:
    return [word for name, value in words.items() for word in (f"--{name}", str(value))]
