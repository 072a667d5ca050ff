"""Real processes that generate side by side: beside training, without room for all, over a link that is cut."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.integration.test_commands import ENVIRONMENT, Run, finish
from tests.integration.test_kills import Killed, short_text

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROMPTS = ("Once upon a time", "One day, Lily and Tom went to the big park with their mom and", "The")
TOKENS = 150

#: Says "begun" once ten tokens have come, and all tokens at the end.
CLIENT = """
import json, sys
import torch
from client_ends import SplitModelForCausalLM

path, join, key, tokens, ids = sys.argv[1:]

class Ten:
    count = 0
    def put(self, value):
        self.count += 1
        if self.count == 10:
            print("begun", flush=True)
    def end(self): ...

model = SplitModelForCausalLM.from_pretrained(path, join, key, device="cpu").eval()
ids = torch.tensor([json.loads(ids)])
found = model.generate(ids, max_new_tokens=int(tokens), do_sample=False, streamer=Ten())
print(json.dumps(found[0].tolist()))
model.close()
"""


@pytest.fixture(scope="module")
def whole(stories: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(stories).eval()


def ids_of(stories: str, prompt: str) -> list[int]:
    return list(AutoTokenizer.from_pretrained(stories)(prompt).input_ids)


def generating(run: Run, index: int, ids: list[int]) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", CLIENT, run.model, run.join, run.keys[index], TOKENS, json.dumps(ids)]
    return subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def assert_expected(process: subprocess.Popen[str], whole: Any, ids: list[int]) -> None:
    code, out, err = finish(process, 300)
    assert code == 0, err[-2000:]
    expected = whole.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)
    assert json.loads(out.splitlines()[-1]) == expected[0].tolist()


def test_three_that_have_room_for_two(tmp_path: Path, stories: str, whole: Any) -> None:
    run = Run(tmp_path, stories, 3, "--cache-tokens", 350, "--client-cache-tokens", 200)
    try:
        rows = [ids_of(stories, prompt) for prompt in PROMPTS]
        clients = [generating(run, index, ids) for index, ids in enumerate(rows)]
        for client, ids in zip(clients, rows, strict=True):
            assert_expected(client, whole, ids)
    finally:
        run.close()


def test_beside_training_over_a_link_that_is_cut(tmp_path: Path, stories: str, whole: Any, data: Path) -> None:
    """The trunk steps with a learning rate of 0, so that the text stays what it is."""
    run = Killed(tmp_path / "run", stories, short_text(tmp_path, data), "--clients", 1, "--lr", 0)
    try:
        trainer = run.train(1)
        ids = ids_of(stories, PROMPTS[1])
        client = generating(run, 0, ids)
        assert client.stdout is not None
        assert client.stdout.readline() == "begun\n"
        run.cut()
        assert_expected(client, whole, ids)
        code, _, err = finish(trainer, 300)
        assert code == 0, err[-2000:]
        assert sum(event["client"].startswith("client0") for event in run.events("server", "joined")) >= 2
    finally:
        run.close()
