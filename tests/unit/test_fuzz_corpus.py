"""Every committed input of the fuzzer, replayed through its target; and ways in which the targets themselves could be blind."""

from __future__ import annotations

from typing import Any

import pytest

from splitfl.protocol import messages as m
from splitfl.protocol.records import FIRST, LAST, METADATA, PAYLOAD
from tests.fuzz.pieces import joined, split
from tests.fuzz.records import assembly
from tests.fuzz.seeds import seeds
from tests.fuzz.targets import CORPUS, TARGETS, inputs_of


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_every_known_input_is_survived(name: str) -> None:
    inputs = [*inputs_of(name), *seeds(name)]
    assert len(inputs) > len(seeds(name)), "the corpus of this target is gone"
    for data in inputs:
        TARGETS[name].run(data)


def test_the_corpus_is_of_targets_that_exist_and_small() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 2**20


def test_pieces_come_back() -> None:
    pieces = [b"", b"a", bytes(300)]
    assert split(joined(pieces)) == pieces
    assert split(b"\xff\xffshort") == [b"short"]


def test_a_target_notices_a_decoder_that_takes_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    part = m.encode(m.EndsPart(0, 0, 0, 4))
    data = joined([bytes([METADATA, FIRST, 0, 0, 4]) + part, bytes([PAYLOAD, LAST, 0, 0, 4]) + b"abcd"])
    assembly(data)
    monkeypatch.setattr("splitfl.protocol.assembly.Inbox._continue", lambda self, frame, header: None)
    with pytest.raises(AssertionError):
        assembly(data)


@pytest.mark.parametrize(
    ("name", "what", "instead"),
    [
        ("server", "splitfl.protocol.credit.CreditAccount.charge", lambda self, size: None),
        ("client", "splitfl.protocol.credit.CreditAccount.receive", lambda self, size: setattr(self, "left", self.left + size)),
        ("control", "splitfl.protocol.messages._names", lambda names: "".join(names)),
        ("payloads", "splitfl.adapters.layout.PartCursor.take", lambda self, message: None),
        ("trunk", "server_trunk.scheduler.Scheduler.withdraw", lambda self, session, chosen=None: []),
        ("trunk", "server_trunk.scheduler.Scheduler.abandon", lambda self, session, step=None: None),
    ],
)
def test_a_target_is_not_blind(name: str, what: str, instead: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one check of the program gone, some known input fails."""
    monkeypatch.setattr(what, instead)
    failed = 0
    for data in [*inputs_of(name), *seeds(name)]:
        try:
            TARGETS[name].run(data)
        except Exception:
            failed += 1
    assert failed
