"""``splitfl generate`` and ``splitfl chat`` as a person uses them, over loopback."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from client_ends.chat_command import Conversation
from splitfl.cli import main
from splitfl.errors import ConfigError
from tests.families import save_family
from tests.integration.test_generate import STORY, family
from tests.world import World, running


@pytest.fixture(scope="module")
def world(stories: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with running(World(tmp_path_factory.mktemp("run"), stories, 1, memory=False)) as world:
        yield world


def joining(world: World) -> list[str]:
    return ["--trunk", world.join, "--identity", str(world.keys[0]), "--model", world.model, "--device", "cpu"]


def test_a_text_is_gone_on_from(world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["generate", STORY[:40], *joining(world), "--max-new-tokens", "60"]) == 0
    written = capsys.readouterr().out.strip()
    assert STORY.startswith(written)
    assert len(written) > 100
    monkeypatch.setattr("sys.stdin", io.StringIO(STORY[:40]))
    assert main(["generate", *joining(world), "--max-new-tokens", "60", "--lookup", "4"]) == 0
    assert capsys.readouterr().out.strip() == written


@pytest.mark.parametrize("words", [(), ("--lookup", "4")])
def test_a_conversation(
    world: World, words: tuple[str, ...], stories: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the whole model answers to all that was said so far."""
    lines = ["Once upon a time", "One day, Lily", "The end."]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n".join(lines)))
    assert main(["chat", *joining(world), "--max-new-tokens", "20", *words]) == 0
    answers = capsys.readouterr().out
    tokenizer, whole = AutoTokenizer.from_pretrained(stories), AutoModelForCausalLM.from_pretrained(stories).eval()
    expected = "\n".join(talk(tokenizer, whole, lines))
    assert [line.strip() for line in answers.splitlines()] == [line.strip() for line in expected.splitlines()]


def talk(tokenizer: Any, whole: Any, lines: list[str], text: str = "", tokens: int = 20) -> list[str]:
    """What the whole model answers to each line, behind all that was said before."""
    answers = []
    for line in lines:
        text += ("\n" if text else "") + line
        ids = torch.tensor([tokenizer(text).input_ids])
        found = whole.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        answers.append(tokenizer.decode(found, skip_special_tokens=True))
        text += answers[-1]
    return answers


def test_a_conversation_outgrows_a_window(stories: str, tmp_path: Path) -> None:
    """Of a family whose first block, the client's, has one; and it begins with an empty cache."""
    windowed = family("gemma3")

    def config() -> Any:
        made = windowed.config()
        made.vocab_size = 512
        return made

    path = str(save_family(dataclasses.replace(windowed, config=config), tmp_path / "model"))
    tokenizer, whole = AutoTokenizer.from_pretrained(stories), AutoModelForCausalLM.from_pretrained(path).eval()
    (tmp_path / "run").mkdir()
    with running(World(tmp_path / "run", path, 1)) as world:
        split = world.join_as(0).eval()
        talking = Conversation(split, tokenizer, {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0})
        lines = ["Once upon a time", "One day, Lily", "The end."]
        assert [talking.say(line) for line in lines] == talk(tokenizer, whole, lines, tokens=12)
        split.close()


def test_what_stands_before_a_conversation(
    world: World, stories: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text begins with it; where there is a chat template, that has the word."""
    monkeypatch.setattr("sys.stdin", io.StringIO("One day, Lily"))
    assert main(["chat", *joining(world), "--max-new-tokens", "20", "--system", "Once upon a time"]) == 0
    tokenizer, whole = AutoTokenizer.from_pretrained(stories), AutoModelForCausalLM.from_pretrained(stories).eval()
    expected = talk(tokenizer, whole, ["One day, Lily"], "Once upon a time")
    assert capsys.readouterr().out.split() == expected[0].split()
    split = world.join_as(0)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ messages[0].content }}"
    )
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    with pytest.raises(ConfigError, match=r"\(System role not supported\): leave --system out"):
        Conversation(split, tokenizer, options, "You are a cat.").say("Who are you?")
    Conversation(split, tokenizer, options).say("Who are you?")
    split.close()


@pytest.mark.parametrize(
    ("words", "says"), [(["generate", "x", "--lookup", "4"], "leave it out"), (["chat"], "use splitfl generate")]
)
def test_what_takes_a_cache_where_there_is_none(
    words: list[str], says: str, stories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(World(tmp_path, stories, 1, memory=False, cache_tokens=0)) as world:
        assert main([*words, *joining(world)]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--top-p", "0"], "--top-p must lie"),
        (["--ends", "nowhere"], "nowhere holds no ends"),
    ],
)
def test_mistakes_are_one_sentence(world: World, words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x", *joining(world), *words]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert len(err.strip().splitlines()) == 1
