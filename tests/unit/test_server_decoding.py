"""Decoding in the trunk's loop: many clients' tokens in one batch, prompts in chunks, beside training, within bounds."""

from __future__ import annotations

import time

import pytest
import torch

from server_trunk.decoding import CHUNK_TOKENS
from server_trunk.gradients import GradientSum
from server_trunk.kvcache import CacheBook
from splitfl.parts.packed import run_segments
from splitfl.parts.rows import Rows
from splitfl.protocol.messages import Fault, Forward, Hidden, Release
from tests.unit.trunkloop_world import HIDDEN, Desk, Event, FullOnce, backward, forward, honest
from tests.world import tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def desk(tmp_path, model):
    desk = Desk(model, tmp_path, clients=1, caches=CacheBook(4000, 3000))
    desk.batches = []
    decode = desk.engine.decode

    def counted(runs):
        desk.batches.append([(run.of.session, run.length) for run in runs])
        return decode(runs)

    desk.engine.decode = counted
    desk.join("a", "b", "c")
    return desk


def rows(tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def following(micro: int, *pieces: tuple[int, int, int, int], step: int = -1, adapter: bool = True) -> Forward:
    """Of each segment ``(sequence, parent, kept, length)``; it begins at position ``kept``."""
    wire = tuple((length, kept) for _, _, kept, length in pieces)
    sequences = tuple((number, (parent, kept)) for number, parent, kept, _ in pieces)
    return Forward(step, micro, wire, HIDDEN, "float32", "raw", False, False, adapter, 0, sequences)


def put(desk: Desk, session: str, message: Forward, hidden: torch.Tensor) -> None:
    desk.loop.inbox.put(Event(session, message, hidden))


def answers(desk: Desk, session: str) -> dict[int, torch.Tensor]:
    return {message.micro: y for own, message, y in desk.outlet.sent if own == session and isinstance(message, Hidden)}


def faults(desk: Desk, session: str) -> list[tuple[str, bool, int | None]]:
    return [(m.code, m.fatal, m.micro) for own, m in desk.outlet.told if own == session and isinstance(m, Fault)]


def whole(desk: Desk, hidden: torch.Tensor, start: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return run_segments(desk.trunk, hidden, Rows(((len(hidden), start),), False))


def run(desk: Desk) -> None:
    batches = desk.loop._batches
    while not desk.loop.inbox.empty() or batches.has_work or batches.decoder.due is not None:
        desk.loop._turn()


def test_tokens_and_prompts_of_several_clients_run_together(desk):
    """A prompt of several chunks, one of a few tokens, and single tokens: in the same batches, each as if it were alone."""
    long, short, single = rows(3 * CHUNK_TOKENS, 1), rows(9, 2), rows(40, 3)
    put(desk, "c", following(0, (5, -1, 0, 20)), single[:20])
    run(desk)
    put(desk, "a", following(0, (0, -1, 0, len(long))), long)
    put(desk, "b", following(0, (0, -1, 0, 4)), short[:4])
    found = [answers(desk, "c")[0]]
    for token in range(20, 40):
        put(desk, "c", following(token, (5, 5, token, 1)), single[token : token + 1])
        desk.loop._turn()
        found.append(answers(desk, "c")[token])
    put(desk, "b", following(1, (0, 0, 4, 5)), short[4:])
    run(desk)
    assert torch.allclose(torch.cat(found), whole(desk, single), atol=1e-5)
    assert torch.allclose(answers(desk, "a")[0], whole(desk, long), atol=1e-5)
    assert torch.allclose(torch.cat([answers(desk, "b")[0], answers(desk, "b")[1]]), whole(desk, short), atol=1e-5)
    assert max(sum(length for _, length in batch) for batch in desk.batches) <= CHUNK_TOKENS
    assert {session for session, _ in desk.batches[1]} == {"a", "b", "c"}
    assert desk.loop._batches.decoder._book.held_by("a") == len(long)


def test_a_prompt_in_chunks_may_exceed_what_a_micro_batch_may(model, tmp_path):
    desk = Desk(model, tmp_path, clients=1, caches=CacheBook(4000, 3000), client_tokens=100)
    desk.join("a")
    hidden = rows(120, 0)
    put(desk, "a", following(0, (0, -1, 0, 120)), hidden)
    run(desk)
    assert not desk.outlet.ended
    assert torch.allclose(answers(desk, "a")[0], whole(desk, hidden), atol=1e-5)


def test_a_token_comes_before_training_and_training_goes_on(desk):
    """One turn of the loop runs a batch of each."""
    desk.take(("a", forward(0)))
    put(desk, "b", following(0, (0, -1, 0, 3)), rows(3, 0))
    desk.loop._turn()
    assert [session for session, message, _ in desk.outlet.sent] == ["b", "a"]
    desk.run(*honest("a"))
    assert desk.outlet.closed()[0].step == 0


def test_who_names_the_next_step_waits_for_its_weights(desk):
    hidden = rows(3, 0)
    put(desk, "b", following(0, (0, -1, 0, 3), step=1), hidden)
    desk.run(("a", forward(0)))
    assert not answers(desk, "b")
    before = whole(desk, hidden)
    desk.run(*honest("a"))
    run(desk)
    assert torch.allclose(answers(desk, "b")[0], whole(desk, hidden), atol=1e-5)
    assert not torch.allclose(answers(desk, "b")[0], before, atol=1e-5)


def test_what_is_gone_and_what_never_fits_are_answered_and_nobody_ends(desk):
    put(desk, "a", following(0, (0, 7, 3, 1)), rows(1, 0))
    put(desk, "a", following(1, (1, -1, 0, 3001)), rows(3001, 0))
    run(desk)
    put(desk, "a", following(2, (2, -1, 0, 2)), rows(2, 0))
    run(desk)
    assert list(answers(desk, "a")) == [2]
    put(desk, "a", following(3, (2, 2, 2, 1)), rows(1, 0))
    put(desk, "a", following(4, (3, 2, 2, 1)), rows(1, 0))
    run(desk)
    assert faults(desk, "a") == [("evicted", False, 0), ("cache-full", False, 1)]
    assert list(desk.outlet.ended) == ["a"]  # a second forward about a sequence before the first was answered
    assert desk.outlet.ended["a"].code == "protocol"
    assert desk.loop._batches.decoder._book.held_tokens == 0


def test_room_passes_from_client_to_client(desk):
    for session in "abc":
        put(desk, session, following(0, (0, -1, 0, 1500)), rows(1500, 0))
    run(desk)
    assert all(len(answers(desk, session)[0]) == 1500 for session in "abc")
    put(desk, "a", following(1, (0, 0, 1500, 1)), rows(1, 0))
    put(desk, "c", following(1, (0, 0, 1500, 1)), rows(1, 0))
    run(desk)
    assert faults(desk, "a") == [("evicted", False, 1)]
    assert 1 in answers(desk, "c")


def fails_for(desk: Desk, session: str) -> None:
    """No batch runs that has anything of it."""
    decode = desk.engine.decode

    def failing(runs):
        if any(run.of.session == session for run in runs):
            raise ValueError("no such kernel")
        return decode(runs)

    desk.engine.decode = failing


def test_a_forward_that_cannot_run_ends_its_own_session(desk):
    fails_for(desk, "b")
    for session in "abc":
        put(desk, session, following(0, (0, -1, 0, 3)), rows(3, 0))
    run(desk)
    assert list(desk.outlet.ended) == ["b"]
    assert 0 in answers(desk, "a")
    assert 0 in answers(desk, "c")
    assert desk.events("forward-failed")[0]["client"] == "b"
    assert desk.loop._batches.decoder._book.held_by("b") == 0


def test_of_two_forwards_that_cannot_run_the_first_ends_their_session(desk):
    fails_for(desk, "b")
    for micro in (0, 1):
        put(desk, "b", following(micro, (micro, -1, 0, 3)), rows(3, 0))
    put(desk, "a", following(0, (0, -1, 0, 3)), rows(3, 0))
    run(desk)
    assert list(desk.outlet.ended) == ["b"]
    assert 0 in answers(desk, "a")


def test_a_full_device_drops_what_nobody_is_at_work_on(desk):
    put(desk, "a", following(0, (0, -1, 0, 3)), rows(3, 0))
    run(desk)
    desk.engine.decode = full = FullOnce(desk.engine.decode)
    put(desk, "b", following(0, (0, -1, 0, 3)), rows(3, 1))
    run(desk)
    assert full.was_free == [True]
    assert torch.allclose(answers(desk, "b")[0], whole(desk, rows(3, 1)), atol=1e-5)
    assert desk.loop._batches.decoder._book.held_by("a") == 0
    assert not desk.outlet.ended


@pytest.fixture
def training(model, tmp_path):
    """Two clients are in a step; a third may decode."""
    desk = Desk(model, tmp_path, clients=2, caches=CacheBook(4000, 3000))
    desk.join("a", "b")
    desk.run(("c", "open"))
    return desk


def short_of_memory_with_caches(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device has no memory for training while anything is kept; no batch is made smaller, as on several ranks."""
    put(desk, "c", following(0, (0, -1, 0, 3)), rows(3, 0))
    run(desk)
    book = desk.loop._batches.decoder._book
    assert book.held_tokens
    desk.engine._may_shrink = False

    def full(work):
        def work_if_there_is_room(*args, **options):
            if book.held_tokens:
                raise torch.OutOfMemoryError("full")
            return work(*args, **options)

        return work_if_there_is_room

    monkeypatch.setattr(desk.engine, "_run", full(desk.engine._run))
    monkeypatch.setattr(GradientSum, "differentiate", full(GradientSum.differentiate))


def test_what_is_kept_makes_room_for_training_where_no_batch_is_made_smaller(training, monkeypatch):
    short_of_memory_with_caches(training, monkeypatch)
    training.take(("a", forward(0)), ("b", forward(0)))
    training.loop._turn()
    assert [session for session, message, _ in training.outlet.sent] == ["c", "a", "b"]
    assert len(training.engine._graphs) == 1, "they ran together"
    training.run(*honest("a"), *honest("b"))
    assert training.outlet.closed()
    assert not training.outlet.ended


def test_a_backward_without_room_ends_its_session_and_leaves_room_to_others(training, monkeypatch):
    training.engine._in_place, training.engine.is_atomic = False, True
    training.run(("a", forward(0)))
    training.run(("b", forward(0)))
    short_of_memory_with_caches(training, monkeypatch)
    training.run(("a", backward(0)))
    training.run(*honest("b"))
    assert "full" in training.outlet.ended["a"].text
    assert list(training.outlet.ended) == ["a"]
    assert training.outlet.closed()


def test_released_and_left(desk):
    put(desk, "a", following(0, (0, -1, 0, 3), (1, -1, 0, 3)), rows(6, 0))
    put(desk, "b", following(0, (0, -1, 0, 3)), rows(3, 0))
    run(desk)
    desk.run(("a", Release((1, 9))))
    assert desk.loop._batches.decoder._book.held_tokens == 6
    put(desk, "a", following(1, (2, -1, 0, 3)), rows(3, 0))
    desk.run(("a", None), ("b", None))
    run(desk)
    assert desk.loop._batches.decoder._book.held_tokens == 0
    assert not desk.loop._batches.decoder._waiting


def test_with_and_without_the_adapter_are_apart(desk):
    for session, adapter in zip("abc", (True, False, True), strict=True):
        put(desk, session, following(0, (0, -1, 0, 3), adapter=adapter), rows(3, 0))
    run(desk)
    assert sorted(sorted(session for session, _ in batch) for batch in desk.batches) == [["a", "c"], ["b"]]


def expect(desk: Desk, *sessions: str) -> None:
    """These have decoded, and are expected again soon, as to batches that take long."""
    for session in sessions:
        put(desk, session, following(0, (0, -1, 0, 20)), rows(20, 0))
    run(desk)
    gathering = desk.loop._batches.decoder._gathering
    gathering._batch, gathering._gaps = 60.0, dict.fromkeys(sessions, 10.0)


def test_who_comes_a_little_later_is_in_the_same_batch(desk):
    expect(desk, "a", "b", "c")
    for session in "ab":
        put(desk, session, following(1, (0, 0, 20, 1)), rows(1, 1))
        desk.loop._receive()
        assert not desk.loop._batches.has_work
        assert desk.loop._patience(time.monotonic()) > 1
    put(desk, "c", following(1, (0, 0, 20, 1)), rows(1, 1))
    desk.loop._turn()
    assert desk.batches[-1] == [("a", 1), ("b", 1), ("c", 1)]


def test_a_few_tokens_of_several_rows_are_no_prompt(desk):
    expect(desk, "a", "b")
    put(desk, "a", following(1, *((number, 0, 20, 5) for number in range(4))), rows(20, 1))
    desk.loop._receive()
    assert not desk.loop._batches.has_work
    put(desk, "b", following(1, (0, 0, 20, 17)), rows(17, 1))
    desk.loop._turn()
    assert {session for session, _ in desk.batches[-1]} == {"a", "b"}


def test_a_session_that_decodes_two_is_expected_with_either(desk):
    put(desk, "a", following(0, (1, -1, 0, 20)), rows(20, 1))
    run(desk)
    expect(desk, "a")
    put(desk, "a", following(1, (1, 1, 20, 1)), rows(1, 1))
    desk.loop._receive()
    assert not desk.loop._batches.has_work
    put(desk, "a", following(2, (0, 0, 20, 1)), rows(1, 1))
    desk.loop._turn()
    assert desk.batches[-1] == [("a", 1), ("a", 1)]


def test_a_batch_that_waits_for_others_runs_before_training_does(desk):
    expect(desk, "b", "c")
    put(desk, "b", following(1, (0, 0, 20, 1)), rows(1, 1))
    desk.loop._receive()
    assert not desk.loop._batches.has_work
    desk.take(("a", forward(0)))
    desk.loop._turn()
    assert [session for session, message, _ in desk.outlet.sent][-2:] == ["b", "a"]
