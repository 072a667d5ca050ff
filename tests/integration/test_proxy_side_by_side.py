"""Many requests to ``splitfl proxy`` at a time: side by side, in turns where room is short; who hangs up, is one too many, or
finds the trunk away.
"""

from __future__ import annotations

import concurrent.futures
import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.proxy_world import PROMPT, Served, expected, proxying, splitting


@pytest.fixture(scope="module")
def tokenizer(stories: str) -> Any:
    return AutoTokenizer.from_pretrained(stories)


@pytest.fixture(scope="module")
def split(stories: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with splitting(stories, tmp_path_factory.mktemp("run")) as (_, split):
        yield split


@pytest.fixture(scope="module")
def served(split: Any, tokenizer: Any) -> Any:
    with proxying(split, tokenizer) as served:
        yield served


class _Halted:
    """Lets no message through to the trunk, ``after`` so many, until it is told to; counts them."""

    def __init__(self, split: Any, monkeypatch: pytest.MonkeyPatch, *, after: int = 0) -> None:
        self.arrived, self.open, self.sent = threading.Semaphore(0), threading.Event(), 0
        send = split.trunk.session.send_forward

        def held(*args: Any, **kwargs: Any) -> int:
            self.sent += 1
            if self.sent > after:
                self.arrived.release()
                assert self.open.wait(60)
            return int(send(*args, **kwargs))

        monkeypatch.setattr(split.trunk.session, "send_forward", held)


def test_requests_are_written_side_by_side(split: Any, tokenizer: Any, stories: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with proxying(split, tokenizer, parallel=2) as served, concurrent.futures.ThreadPoolExecutor(2) as pool:
        halted = _Halted(split, monkeypatch)
        prompts = (PROMPT, "The")
        body = {"max_tokens": 5, "temperature": 0}
        asked = [pool.submit(served.ask, "POST", "/v1/completions", body | {"prompt": prompt}) for prompt in prompts]
        for _ in prompts:
            assert halted.arrived.acquire(timeout=60)
        halted.open.set()
        for prompt, future in zip(prompts, asked, strict=True):
            assert future.result()[1]["choices"][0]["text"] == expected(stories, prompt, 5)


def test_more_than_there_is_room_for_is_written_in_turns(
    stories: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        splitting(stories, tmp_path, cache_tokens=50, client_cache_tokens=50) as (_, split),
        proxying(split, tokenizer) as served,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        counted = _Halted(split, monkeypatch)
        counted.open.set()
        prompts = [PROMPT, "The", "One day", "Lily"]
        options = {"model": "stories", "max_tokens": 25, "temperature": 0}
        asked = [pool.submit(served.client().completions.create, prompt=prompt, **options) for prompt in prompts]
        for prompt, future in zip(prompts, asked, strict=True):
            assert future.result().choices[0].text == expected(stories, prompt, 25)
        # A token takes one message. Where each pushes the others' out, a third more has to be sent again.
        assert counted.sent <= 116
        status, answer = served.ask("POST", "/v1/completions", {"prompt": prompts, "max_tokens": 40})
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


def test_room_that_was_had_for_all_choices_is_kept_while_the_prompt_is_scored(
    served: Served, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, heard = served.desk._turns, []
    grow = turns.grow

    def hears(turn: Any, tokens: int) -> bool:
        heard.append((turn.tokens, tokens))
        return grow(turn, tokens)

    monkeypatch.setattr(turns, "grow", hears)
    options = {"model": "stories", "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 0}
    served.client().completions.create(**options, n=3)
    assert heard[0][0] == 3 * len(tokenizer(PROMPT).input_ids)
    assert all(now >= before for before, now in heard)


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_is_written_for_no_more(
    split: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, stream: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before its first token, or amid a stream; while it is written, or waits in the line."""
    with proxying(split, tokenizer, parallel=1) as served:
        halted = _Halted(split, monkeypatch, after=3 if stream else 0)
        raw = json.dumps({"prompt": PROMPT, "max_tokens": 400, "temperature": 0, "stream": stream}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(raw)}\r\n\r\n"
        caller, waiting = (socket.create_connection(("127.0.0.1", served.port)) for _ in range(2))
        caller.sendall(head.encode() + raw)
        assert halted.arrived.acquire(timeout=60)
        if stream:
            assert caller.recv(1000).startswith(b"HTTP/1.1 200 OK")
        waiting.sendall(head.encode() + raw)
        caller.close()
        waiting.close()
        halted.open.set()
        assert served.desk.wait_until_idle(60)
        assert halted.sent < 200
        assert served.ask("GET", "/health")[0] == 200
    assert not capsys.readouterr().err


def test_beyond_the_line_it_is_429_and_at_the_end_503(split: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"prompt": PROMPT, "max_tokens": 400, "temperature": 0}
    with proxying(split, tokenizer, parallel=1, queue=1) as served, concurrent.futures.ThreadPoolExecutor(3) as pool:
        halted = _Halted(split, monkeypatch)
        first = pool.submit(served.ask, "POST", "/v1/completions", body)
        assert halted.arrived.acquire(timeout=60)
        others = [pool.submit(served.ask, "POST", "/v1/completions", body) for _ in range(2)]
        done, _ = concurrent.futures.wait(others, 60, concurrent.futures.FIRST_COMPLETED)
        assert [future.result()[0] for future in done] == [429]
        served.stop()
        (left,) = set(others) - done
        assert left.result()[0] == 503
        halted.open.set()
        assert first.result()[0] == 503


def test_while_the_trunk_is_away_it_is_503_and_then_goes_on(
    served: Served, split: Any, stories: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split.trunk.session, "_up", False)
    status, answer = served.ask("POST", "/v1/completions", {"prompt": PROMPT})
    assert (status, answer["error"]["code"]) == (503, "trunk_away")
    assert served.ask("GET", "/health")[0] == 503
    monkeypatch.undo()
    assert served.ask("GET", "/health")[0] == 200
