"""``splitfl generate`` and ``splitfl chat`` as a person uses them, over loopback."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from splitfl.cli import main
from tests.integration.test_generate import STORY
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
    text, expected = "", ""
    for line in lines:
        text += ("\n" if text else "") + line
        ids = torch.tensor([tokenizer(text).input_ids])
        found = whole.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
        text += tokenizer.decode(found, skip_special_tokens=True)
        expected += tokenizer.decode(found, skip_special_tokens=True) + "\n"
    assert [line.strip() for line in answers.splitlines()] == [line.strip() for line in expected.splitlines()]


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
