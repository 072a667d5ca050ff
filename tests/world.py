"""A run in one process: a real server, real clients, over the in-memory transport or over sockets on loopback."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from client_ends.model import SplitModelForCausalLM
from server_trunk.server import TrunkServer
from splitfl.channel.timing import Timing
from splitfl.config import RunConfig, build_config
from splitfl.protocol.keys import read_identity, write_identity
from splitfl.transport.memory import MemoryClientTransport, MemoryNetwork, MemoryServerTransport


def tiny_llama(directory: Path, *, seed: int = 0, blocks: int = 4) -> str:
    """A Llama of hidden size 32 with random weights, saved; returns its path."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=600,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return str(directory)


def set_aside(directory: Path) -> None:
    """As where a process has died between the two renames that give a name to another directory."""
    aside = directory.with_name(f".{directory.name}.0123abcd.old")
    aside.mkdir()
    directory.rename(aside / directory.name)


class World:
    """``clients`` authorised clients of one server, of whom step 0 awaits ``needed`` (default all). ``join_as`` gives a
    client's model.
    """

    def __init__(
        self,
        work: Path,
        model: str,
        clients: int,
        *,
        needed: int | None = None,
        memory: bool = True,
        timing: Timing | None = None,
        **settings: Any,
    ) -> None:
        self.work, self.model = work, model
        self.keys = [work / f"client{index}.key" for index in range(clients)]
        lines = [f"{write_identity(key).public} client{index}" for index, key in enumerate(self.keys)]
        (work / "authorized_clients").write_text("\n".join(lines) + "\n")
        write_identity(work / "server.key")
        values = {
            "model": model,
            "clients": needed or clients,
            "out": str(work / "server"),
            "identity": str(work / "server.key"),
            "authorized_clients": str(work / "authorized_clients"),
            "device": "cpu",
            "checkpoint_every": 0,
        }
        self.network = MemoryNetwork() if memory else None
        transport = MemoryServerTransport(self.network, read_identity(work / "server.key")) if self.network else None
        self.server = TrunkServer(build_config(values | settings), transport=transport, timing=timing)

    @property
    def config(self) -> RunConfig:
        return self.server.config

    @property
    def join(self) -> str:
        return str(self.server.join)

    def channel_options(self) -> dict[str, Any]:
        return {"transport": MemoryClientTransport(self.network)} if self.network else {}

    def join_as(self, client: int, face: Any = SplitModelForCausalLM, **options: Any) -> Any:
        """The model of one client; ``options`` go to ``from_pretrained``."""
        options = {"device": "cpu", "channel_options": self.channel_options()} | options
        model = options.pop("model", self.model)
        return face.from_pretrained(model, options.pop("join", self.join), self.keys[client], **options)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What the server logged of a kind."""
        import json

        lines = (self.work / "server" / "log.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]


@contextlib.contextmanager
def running(world: World) -> Iterator[World]:
    world.server.start()
    try:
        yield world
    finally:
        world.server.stop()


def side_by_side(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Run ``work(0..count-1)`` in threads; returns the results, or raises the first error."""
    results: list[Any] = [None] * count
    errors: list[BaseException] = []

    def call(index: int) -> None:
        try:
            results[index] = work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
        if errors:
            raise errors[0]
        assert not thread.is_alive(), "a client hangs"
    return results
