"""``splitfl proxy`` as a process beside a server's, and the lm-eval harness through it."""

from __future__ import annotations

import json
import signal
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from openai import AuthenticationError, InternalServerError, OpenAI
from transformers import AutoTokenizer

from client_ends.scoring import harness_scores
from splitfl.cli import main
from splitfl.protocol.join import JoinString
from splitfl.protocol.keys import write_identity
from tests.faults.stage import wait_until
from tests.forks import splitfl
from tests.integration.test_commands import Run, finish
from tests.integration.test_kills import Killed, short_text
from tests.proxy_world import expected, proxying, splitting, whole

PROMPT = "One day, Lily and Tom went to the big park with their mom and"
TASKS = Path(__file__).parents[1] / "tasks"


class Proxied:
    """``splitfl proxy`` as a process."""

    def __init__(self, run: Run, *options: object, **environment: str) -> None:
        joining = ("--trunk", run.join, "--identity", run.keys[0], "--model", run.model, "--device", "cpu")
        self.process = splitfl("proxy", *joining, "--port", 0, *options, **environment)
        line = self.process.stdout.readline()
        assert " at http://" in line, self.process.stderr.read()
        self.name, _, self.url = line.strip().partition(" at ")

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=120)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


def health(url: str) -> int:
    """The status of /health."""
    try:
        with urllib.request.urlopen(url.removesuffix("/v1") + "/health", timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_with_a_key_ends_at_a_signal(tmp_path: Path, stories: str, number: signal.Signals) -> None:
    run = Run(tmp_path, stories, 1)
    proxied = Proxied(run, "--name", "tales", SPLITFL_API_KEY="open-sesame")
    try:
        assert proxied.name == "tales"
        assert proxied.client("open-sesame").models.list().data[0].id == "tales"
        with pytest.raises(AuthenticationError):
            proxied.client().models.list()
        options: dict[str, Any] = {"model": "tales", "prompt": PROMPT, "temperature": 0}
        answer = proxied.client("open-sesame").completions.create(**options, max_tokens=20)
        assert answer.choices[0].text == expected(stories, PROMPT, 20)
        stream = iter(proxied.client("open-sesame").completions.create(**options, max_tokens=300, stream=True))
        next(stream)
        proxied.process.send_signal(number)
        code, out, err = finish(proxied.process, 60)
        assert code == 0, err
        assert not err
        assert "Lily" not in out
        assert "sesame" not in out
    finally:
        proxied.close()
        run.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_link_that_is_cut_is_had_again_and_a_server_that_is_gone_ends_it(tmp_path: Path, stories: str, data: Path) -> None:
    run = Killed(tmp_path / "run", stories, short_text(tmp_path, data), "--lr", 0)
    proxied = Proxied(run, "--reconnect", 15)
    try:
        client = proxied.client()
        options: dict[str, Any] = {"model": stories, "prompt": PROMPT, "temperature": 0}
        text, cut = "", False
        for chunk in client.completions.create(**options, max_tokens=150, stream=True):
            text += chunk.choices[0].text
            if len(text) > 40 and not cut:
                run.cut()
                cut = True
        assert text == expected(stories, PROMPT, 150)
        run.server.send_signal(signal.SIGKILL)
        run.link.close()
        wait_until(lambda: health(proxied.url) == 503)
        with pytest.raises(InternalServerError, match="the link to the trunk is down"):
            client.completions.create(**options, max_tokens=1)
        code, _, err = finish(proxied.process, 200)
        assert code == 1
        assert "connecting again" in err
        assert "Traceback" not in err
        assert "no other session could be had" in err.splitlines()[-1]
    finally:
        proxied.close()
        run.close()


@pytest.mark.slow
@pytest.mark.parametrize("ways", [{"batch_size": 4}, {"num_concurrent": 4}, {"tokenized_requests": False}])
def test_the_harness_finds_the_same_numbers_through_it(
    stories: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ways: dict[str, Any]
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(Path(__file__).parents[2])  # where the tasks look for their rows from
    task, limit = "splitfl_copa", 25
    tokenizer = AutoTokenizer.from_pretrained(stories)
    direct = harness_scores(whole(stories), tokenizer, [task], batch_size=8, include=TASKS, limit=limit)
    with splitting(stories, tmp_path) as (_, split), proxying(split, tokenizer) as served:
        api = LocalCompletionsAPI(
            base_url=f"{served.url}/completions",
            model="stories",
            tokenizer=stories,
            tokenizer_backend="huggingface",
            max_length=512,
            **ways,
        )
        found = simple_evaluate(
            api,
            tasks=[task],
            limit=limit,
            task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
        )
    assert found["results"][task]["acc,none"] == direct[task]["acc"]
    assert 0 < direct[task]["acc"] < 1
    json.dumps(found["results"], default=str)


@pytest.fixture
def joining(tmp_path: Path) -> list[str]:
    """Flags that can be read, and lead nowhere."""
    join = JoinString(write_identity(tmp_path / "client.key").public, "127.0.0.1", 9)
    return ["--trunk", str(join), "--identity", str(tmp_path / "client.key")]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--host", "0.0.0.0"), "set a key"),
        (("--host", "nowhere.invalid"), "no such address"),
        (("--port", "70000"), "--port must be at most"),
        (("--parallel", "0"), "--parallel must be at least 1"),
        (("--api-key", ""), "a key is letters"),
        (("--chat-template", "nowhere"), "no such file"),
        (("--chat-template", "latin1"), "give a text file in UTF-8"),
    ],
)
def test_a_mistake_is_one_sentence(
    words: tuple[str, ...],
    says: str,
    joining: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin1").write_bytes(b"\xe9t\xe9")
    assert main(["proxy", *joining, "--port", "0", *words]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_a_port_that_is_taken_and_a_package_that_is_missing(
    joining: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["proxy", *joining, "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen at" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    assert main(["proxy", *joining]) == 2
    assert "pip install 'splitfl[proxy]'" in capsys.readouterr().err
