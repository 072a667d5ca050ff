"""Tokens to text as they come, and stops: whatever the pieces, the whole comes out."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from client_ends.proxy.texts import GrowingText, StopFinder, spell
from splitfl.sample.model import byte_tokenizer


@given(
    st.lists(st.text("ab.", max_size=4), max_size=12),
    st.lists(st.text("ab.", min_size=1, max_size=5), max_size=3),
)
def test_a_stop_is_found_wherever_the_pieces_end(pieces: list[str], stops: list[str]) -> None:
    finder, out = StopFinder(stops), ""
    for piece in pieces:
        new = finder.add(piece)
        out += new
        assert not any(stop in out for stop in stops)
    found = finder.found
    out += finder.rest()
    # The first place where a stop is whole, read from the left, piece by piece.
    text = ""
    for piece in pieces:
        text += piece
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            assert found
            assert out == text[: min(places)]
            return
    assert not found
    assert out == text


def test_a_character_of_several_tokens_comes_as_a_whole() -> None:
    bytewise = byte_tokenizer()
    text = "héllo, 世界 🙂 end"
    ids = bytewise(text, add_special_tokens=False).input_ids
    assert len(ids) > len(text)
    for begin in (0, 2, 5):  # also where the prompt ends amid a character
        growing = GrowingText(bytewise, ids[:begin])
        pieces = [growing.add(token) for token in ids[begin:]]
        assert not any("�" in piece for piece in pieces)
        assert text.endswith("".join(pieces))
        assert "".join(pieces) == text[len(bytewise.decode(ids[:begin]).rstrip("�")) :]
    growing = GrowingText(bytewise)
    half = bytewise("é", add_special_tokens=False).input_ids[0]
    assert growing.add(half) == ""
    assert growing.rest() == "�"
    assert growing.rest() == ""


def test_a_piece_of_a_sentence_keeps_its_space(stories: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    ids = tokenizer("Once upon a time, there was a dog.").input_ids
    growing = GrowingText(tokenizer, ids[:4])
    text = "".join(growing.add(token) for token in ids[4:])
    assert tokenizer.decode(ids[:4], skip_special_tokens=True) + text == "Once upon a time, there was a dog."
    assert "".join(spell(tokenizer, token, before) for before, token in itertools.pairwise(ids[3:])) == text
    assert spell(tokenizer, tokenizer.eos_token_id) == "</s>"
