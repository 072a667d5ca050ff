"""What the trunk has lost of a sequence, evicted or gone with the session, is sent again; whoever generates notices nothing."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from splitfl.errors import UserError
from splitfl.transport.memory import MemoryClientTransport
from tests.integration.test_lost import QUICK, cut, wait_for
from tests.world import World, running, side_by_side, tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(model):
    return LlamaForCausalLM.from_pretrained(model).eval()


def prompt(seed: int, rows: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def options(**more: Any) -> dict[str, Any]:
    return {"do_sample": False, "pad_token_id": 0, "min_new_tokens": 20, "max_new_tokens": 20} | more


class _After:
    """Does something once, amid an answer: when ``count`` tokens have come."""

    def __init__(self, count: int, do: Any) -> None:
        self._left, self._do = count, do

    def put(self, value: torch.Tensor) -> None:
        self._left -= 1
        if not self._left:
            self._do()

    def end(self) -> None: ...


def test_clients_that_push_each_other_out(tmp_path: Path, model: str, whole: Any) -> None:
    """There is room for one at a time; each token of one may cost the other all it had."""
    with running(World(tmp_path, model, 2, cache_tokens=70, client_cache_tokens=70)) as world:
        clients = [world.join_as(index).eval() for index in range(2)]

        def generate(index: int) -> torch.Tensor:
            return clients[index].generate(**prompt(index), **options())

        found = side_by_side(2, generate)
        for index, tokens in enumerate(found):
            assert torch.equal(tokens, whole.generate(**prompt(index), **options()))
        for client in clients:
            client.close()
        assert world.server._caches.held_tokens <= 70


def test_beams_whose_sequences_were_evicted_amid(tmp_path: Path, model: str, whole: Any) -> None:
    with running(World(tmp_path, model, 1)) as world:
        client = world.join_as(0).eval()
        session, calls, evicted = client.trunk.session, itertools.count(1), []
        forward = session.send_forward

        def send(*args: Any, **kwargs: Any) -> int:
            if (call := next(calls)) in (3, 9, 15):
                # An answer leaves a moment before the trunk's thread has put its sequences away.
                wait_for(lambda: world.server._caches.evict_idle() > 0)
                evicted.append(call)
            return int(forward(*args, **kwargs))

        session.send_forward = send
        found = client.generate(**prompt(3), **options(num_beams=4))
        assert torch.equal(found, whole.generate(**prompt(3), **options(num_beams=4)))
        assert evicted == [3, 9, 15]
        client.close()


def test_a_link_that_breaks_amid_an_answer(tmp_path: Path, model: str, whole: Any) -> None:
    world = World(tmp_path, model, 1, timing=QUICK)
    with running(world):
        transport = {"transport": lambda: MemoryClientTransport(world.network)}
        client = world.join_as(0, channel_options=transport).eval()
        session = client.trunk.session.channel.opened.session
        ids = prompt(5)["input_ids"][:1]
        found = client.generate(ids, **options(), streamer=_After(7, lambda: cut(client)))
        assert torch.equal(found, whole.generate(ids, **options()))
        assert client.trunk.session.channel.opened.session != session
        client.close()


def test_more_than_a_client_has_room_for_is_said_and_the_session_goes_on(tmp_path: Path, model: str, whole: Any) -> None:
    with running(World(tmp_path, model, 1, client_cache_tokens=40)) as world:
        client = world.join_as(0).eval()
        with pytest.raises(UserError, match="client_cache_tokens"):
            client.generate(**prompt(1), **options())
        ids = prompt(1)["input_ids"][:1]
        assert torch.equal(client.generate(ids, **options()), whole.generate(ids, **options()))
        assert torch.equal(
            client.generate(**prompt(1), **options(use_cache=False)), whole.generate(**prompt(1), **options(use_cache=False))
        )
        client.close()


def test_what_is_no_longer_wanted_is_released(tmp_path: Path, model: str) -> None:
    with running(World(tmp_path, model, 1)) as world:
        client = world.join_as(0).eval()
        for _ in range(3):
            client.generate(**prompt(1), **options(num_beams=3))
        client.generate(**prompt(1), **options(max_new_tokens=1, min_new_tokens=1))
        assert world.server._caches.held_tokens <= 2 * 12 + 6 * (12 + 20)
        client.close()
