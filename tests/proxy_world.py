"""The endpoint of ``splitfl proxy`` in this process, in front of a model that has joined a run; what the whole model writes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.client
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from client_ends.proxy.desk import Desk
from client_ends.proxy.door import Door
from client_ends.proxy.endpoint import build
from client_ends.proxy.serving import listen, serve, url_of
from splitfl.transport.memory import MemoryClientTransport
from tests.integration.test_lost import QUICK
from tests.world import World, running

__all__ = ["PROMPT", "Served", "expected", "proxying", "splitting", "whole", "written"]

PROMPT = "Once upon a time"


@functools.cache
def whole(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path).eval()


def written(model: Any, tokenizer: Any, text: str, tokens: int, *, special: bool = True, **options: Any) -> str:
    """What a model writes after a text, greedily. ``special``: with the tokens that the tokenizer puts before it."""
    ids = torch.tensor([tokenizer(text, add_special_tokens=special).input_ids])
    found = model.generate(ids, max_new_tokens=tokens, do_sample=False, **options)[0].tolist()
    before: str = tokenizer.decode(ids[0], skip_special_tokens=True)
    return str(tokenizer.decode(found, skip_special_tokens=True))[len(before) :]


@functools.cache
def expected(path: str, text: str, tokens: int, **options: Any) -> str:
    """What the whole model at ``path`` writes; ``options``: as of :func:`written`."""
    return written(whole(path), AutoTokenizer.from_pretrained(path), text, tokens, **options)


@contextlib.contextmanager
def splitting(path: str, work: Path, **settings: Any) -> Iterator[tuple[World, Any]]:
    """A run of one client in this process, and its model; ``settings``: the run's."""
    with running(World(work, path, 1, timing=QUICK, **settings)) as world:
        split = world.join_as(0, channel_options={"transport": lambda: MemoryClientTransport(world.network)}).eval()
        try:
            yield world, split
        finally:
            split.close()


@dataclass
class Served:
    url: str
    port: int
    desk: Desk
    stop: Any  # a function

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON. ``body``: bytes as they are, else as JSON; a header ``Content_Type`` is sent as ``Content-Type``."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        named = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, raw, named)
        answer = connection.getresponse()
        found = answer.status, json.loads(answer.read())
        connection.close()
        return found


@contextlib.contextmanager
def proxying(model: Any, tokenizer: Any, *, name: str = "stories", key: str | None = None, **options: Any) -> Iterator[Served]:
    """``options``: see :func:`build`."""
    bound = listen("127.0.0.1", 0, has_key=False)
    endpoint, desk = build(model, tokenizer, name=name, door=Door(key, local=True), **options)
    up, kept = threading.Event(), {}

    async def run() -> None:
        kept["stop"], kept["loop"] = asyncio.Event(), asyncio.get_running_loop()
        await serve(endpoint.app(), bound, session=model.trunk.session, ready=up.set, stop=kept["stop"])

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    assert up.wait(30)

    def stop() -> None:
        kept["loop"].call_soon_threadsafe(kept["stop"].set)

    try:
        yield Served(url_of(bound), bound.getsockname()[1], desk, stop)
    finally:
        if thread.is_alive():
            stop()
        thread.join(30)
        bound.close()
        assert not thread.is_alive()
        assert desk.wait_until_idle(30)
