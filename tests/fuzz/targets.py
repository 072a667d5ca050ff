"""The targets by name. Each takes any bytes; it returns, whatever they are, or has found a bug."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz import handshake, messages, payloads, records, texts, trunk

__all__ = ["CORPUS", "TARGETS", "Target", "inputs_of"]

CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True)
class Target:
    """``form``: how an input is best changed: one msgpack ``frame``, ``pieces`` with a frame each, or ``bytes``. ``weight``: its
    part of a search over all targets. ``skip``: bytes before the first piece.
    """

    run: Callable[[bytes], None]
    form: str
    weight: int = 1
    skip: int = 0


TARGETS: dict[str, Target] = {
    "control": Target(messages.control, "frame", 30),
    "metadata": Target(messages.metadata, "frame", 30),
    "server": Target(handshake.server, "pieces", 1),
    "client": Target(handshake.client, "pieces", 2),
    "records": Target(records.records, "pieces", 10),
    "assembly": Target(records.assembly, "bytes", 3),
    "payloads": Target(payloads.payloads, "pieces", 1, skip=1),
    "trunk": Target(trunk.trunk, "bytes", 1),
    "texts": Target(texts.texts, "bytes", 10),
    "replicas": Target(texts.replicas, "frame", 12),
}


def inputs_of(name: str) -> list[bytes]:
    """The committed inputs of a target."""
    return [path.read_bytes() for path in sorted((CORPUS / name).glob("*")) if path.is_file()]
