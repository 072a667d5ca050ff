"""Which sequences the trunk keeps, and what goes when there is no room."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch

from server_trunk import kvcache
from server_trunk.kvcache import CacheBook, CacheFull, Evicted
from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import Forward


def forward(*pieces: tuple[int, int, int, int]) -> Forward:
    """Of each segment ``(sequence, parent, kept, length)``."""
    wire = tuple((length, kept) for _, _, kept, length in pieces)
    sequences = tuple((number, (parent, kept)) for number, parent, kept, _ in pieces)
    return Forward(-1, 0, wire, 1, "float32", "raw", False, False, True, 0, sequences)


def run(book: CacheBook, session: str, *pieces: tuple[int, int, int, int], value: float = 0.0, client: str = "") -> None:
    """As the decoder does it; each new token's key and value are its place in the sequence plus ``value``."""
    said = forward(*pieces)
    book.expect(session, said)
    try:
        kept = book.begin(session, client or session, said)
    except (Evicted, CacheFull):
        book.give_up(session, said)
        raise
    assert kept is not None
    for each, (_, _, _, length) in zip(kept, pieces, strict=True):
        numbers = value + torch.arange(each.length, each.length + length).float().view(1, 1, length, 1)
        each.append(0, numbers, -numbers)
        each.commit(length)
    book.done(session, said)


def read(book: CacheBook, session: str, number: int) -> list[float]:
    kept = book._sessions[session][number].kept
    keys, values = kept.append(0, torch.empty(1, 1, 0, 1), torch.empty(1, 1, 0, 1))
    assert torch.equal(keys, -values)
    return keys.flatten().tolist()


def test_a_sequence_grows_and_is_cropped() -> None:
    book = CacheBook(1000, 1000)
    run(book, "a", (7, -1, 0, 3))
    for kept in range(3, 200):
        run(book, "a", (7, 7, kept, 1))
    assert read(book, "a", 7) == list(range(200))
    run(book, "a", (7, 7, 150, 2), value=0.5)
    assert read(book, "a", 7) == [*range(150), 150.5, 151.5]
    assert book.held_tokens == 152


def test_rows_that_change_places_take_what_their_parents_had() -> None:
    """As beam search does it: all parents are meant as they were before the message."""
    book = CacheBook(1000, 1000)
    run(book, "a", *((number, -1, 0, 2) for number in range(4)))
    run(book, "a", *((number, number, 2, 1) for number in range(4)))
    for number in range(4):
        keys, _ = book._sessions["a"][number].kept.append(0, torch.empty(1, 1, 0, 1), torch.empty(1, 1, 0, 1))
        keys += 10 * number
        book._sessions["a"][number].kept._layers[0][1].neg_().copy_(-book._sessions["a"][number].kept._layers[0][0])
    run(book, "a", (0, 1, 3, 1), (1, 0, 2, 1), (2, 1, 3, 1), (3, 3, 1, 1))
    assert read(book, "a", 0) == [10, 11, 12, 3]
    assert read(book, "a", 1) == [0, 1, 2]
    assert read(book, "a", 2) == [10, 11, 12, 3]
    assert read(book, "a", 3) == [30, 1]


def test_a_parent_that_is_not_overwritten_stays_as_it_is() -> None:
    book = CacheBook(1000, 1000)
    run(book, "a", (0, -1, 0, 5))
    run(book, "a", (1, 0, 4, 2), (2, 0, 5, 1), value=0.5)
    assert read(book, "a", 0) == [0, 1, 2, 3, 4]
    assert read(book, "a", 1) == [0, 1, 2, 3, 4.5, 5.5]
    assert read(book, "a", 2) == [0, 1, 2, 3, 4, 5.5]


def test_least_recently_used_goes_first_and_a_clients_own_before_others() -> None:
    book = CacheBook(30, 20)
    run(book, "a", (0, -1, 0, 8))
    run(book, "b", (0, -1, 0, 8))
    run(book, "a", (1, -1, 0, 8))
    run(book, "a", (0, 0, 8, 1))
    run(book, "a", (2, -1, 0, 4))  # 21 of its own, so the older of them goes; b, older still, is not in the way
    assert set(book._sessions["a"]) == {0, 2}
    with pytest.raises(Evicted, match="sequence 1"):
        run(book, "a", (1, 1, 8, 1))
    run(book, "c", (0, -1, 0, 12))  # there is no room for it in all
    assert "b" not in book._sessions
    assert book.held_tokens == 25


def test_what_is_followed_is_not_evicted_for_what_follows_it() -> None:
    book = CacheBook(20, 20)
    run(book, "a", (0, -1, 0, 9), (1, -1, 0, 9))
    run(book, "a", (2, 0, 9, 1))
    assert set(book._sessions["a"]) == {0, 2}
    with pytest.raises(Evicted, match="side by side"):
        run(book, "a", (3, 0, 9, 3))
    run(book, "a", (3, -1, 0, 12))  # sent as a whole it fits, once others are gone
    assert book.held_tokens <= 20


def test_two_sessions_of_a_client_share_its_room() -> None:
    book = CacheBook(100, 10)
    run(book, "a1", (0, -1, 0, 6), client="a")
    run(book, "a2", (0, -1, 0, 6), client="a")
    assert "a1" not in book._sessions
    assert book.held_by("a") == 6


def test_too_long_for_any_client_is_said() -> None:
    book = CacheBook(100, 10)
    with pytest.raises(CacheFull, match="2 sequences of 12 tokens together"):
        run(book, "a", (0, -1, 0, 6), (1, -1, 0, 6))
    run(book, "a", (0, -1, 0, 10))


def test_room_that_others_are_at_work_on_is_waited_for() -> None:
    book = CacheBook(10, 10)
    first, second = forward((0, -1, 0, 8)), forward((0, -1, 0, 4))
    book.expect("a", first)
    book.expect("b", second)
    assert book.begin("a", "a", first) is not None
    assert book.begin("b", "b", second) is None
    book.give_up("a", first)
    assert book.begin("b", "b", second) is not None
    assert book.held_tokens == 4


def test_a_sequence_is_in_one_forward_at_a_time() -> None:
    book = CacheBook(100, 100)
    run(book, "a", (0, -1, 0, 1))
    book.expect("a", forward((1, 0, 1, 1)))
    for again in (forward((1, -1, 0, 1)), forward((0, -1, 0, 1)), forward((2, 0, 1, 1))):
        with pytest.raises(RemoteProtocolError, match="at the same time"):
            book.expect("a", again)
    book.expect("b", forward((0, -1, 0, 1)))


def test_so_many_sequences_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvcache, "MAX_SEQUENCES", 8)
    book = CacheBook(100, 100)
    for begin in (0, 4):
        run(book, "a", *((number, -1, 0, 1) for number in range(begin, begin + 4)))
    with pytest.raises(RemoteProtocolError, match="more than 8 sequences"):
        book.expect("a", forward((8, -1, 0, 1)))


def test_what_is_released_while_it_is_written_goes_afterwards() -> None:
    book = CacheBook(100, 100)
    said = forward((0, -1, 0, 3))
    book.expect("a", said)
    assert book.begin("a", "a", said) is not None
    book.release("a", (0, 5))
    assert book.held_tokens == 3
    book.done("a", said)
    assert book.held_tokens == 0
    assert not book._sessions


def test_nothing_is_left_of_a_session() -> None:
    book = CacheBook(100, 100)
    run(book, "a", (0, -1, 0, 3))
    book.expect("a", forward((0, 0, 3, 1)))
    book.forget("a")
    assert not book._sessions
    assert not book._expected
    run(book, "b", (0, -1, 0, 3))
    assert book.evict_idle() == 3
    assert not book._sessions


def real_tokens(book: CacheBook) -> int:
    """Tokens that memory has been made for."""
    return sum(held.kept.room for own in book._sessions.values() for held in own.values())


def test_memory_is_what_was_counted_and_a_quarter() -> None:
    """A sequence that is cut short gives its memory back, and short ones take little."""
    book = CacheBook(4000, 2000)
    for number in range(20):
        run(book, "a", (number, -1, 0, 1500))
        run(book, "a", (number, number, 1, 1))
        assert real_tokens(book) <= 1.25 * book.held_tokens
    assert book.held_tokens == 40
    run(book, "b", *((number, -1, 0, 1) for number in range(500)))
    assert real_tokens(book) <= 1.25 * book.held_tokens
    length = 1
    for turn in range(60):  # as speculation does, a few tokens on and some of them back
        kept = max(1, length - turn % 4)
        length = kept + 4
        run(book, "b", *((number, number, kept, 4) for number in range(4)))
        assert real_tokens(book) <= 1.25 * book.held_tokens
    run(book, "c", (0, -1, 0, 1000))
    run(book, "c", (0, 0, 10, 5), (1, 0, 900, 5))  # the longer one takes over the memory
    assert real_tokens(book) <= 1.25 * book.held_tokens


def test_the_sums_are_those_of_what_is_there() -> None:
    """Whatever comes, and goes."""
    draw = random.Random(0)
    book = CacheBook(300, 120)
    for _ in range(600):
        session = draw.choice(["a1", "a2", "b1", "c1"])
        client = session[0]
        own = sorted(book._sessions.get(session, {}))
        number, parent = draw.randrange(6), draw.choice([*own, -1])
        kept = 0 if parent < 0 else draw.randint(1, book._sessions[session][parent].kept.length)
        what = draw.randrange(12)
        if what == 0:
            book.release(session, (number,))
        elif what == 1 and session == "b1":
            book.forget(session)
        else:
            with contextlib.suppress(Evicted, CacheFull):
                run(book, session, (number, parent, kept, draw.randint(1, 60)), client=client)
        held = [held for own in book._sessions.values() for held in own.values()]
        assert book.held_tokens == sum(each.tokens for each in held) <= 300
        assert all(book.held_by(one) == sum(each.tokens for each in held if each.client == one) <= 120 for one in "abc")
        assert set(book._idle) == set(held)
        assert all(each.tokens >= each.kept.length for each in held)
    book.evict_idle()
    assert not any((book._sessions, book._accounts, book._idle, book._expected))


def test_a_clients_sequences_are_so_many_over_its_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvcache, "MAX_SEQUENCES", 8)
    book = CacheBook(100, 100)
    for session in ("a1", "a2"):
        run(book, session, *((number, -1, 0, 1) for number in range(5)), client="a")
    run(book, "b", *((number, -1, 0, 1) for number in range(8)))
    assert len(book._sessions["a1"]) == 3
    assert len(book._sessions["a2"]) == 5
    assert book.held_by("b") == 8


def test_nobody_is_looked_at_whom_a_forward_is_not_about() -> None:
    """Each of the trunk's turns begins forwards: their cost is not to grow with what is kept."""

    class Watched(dict):  # type: ignore[type-arg]
        looks = 0

        def __iter__(self):  # type: ignore[no-untyped-def]
            Watched.looks += len(self)
            return super().__iter__()

        def values(self):  # type: ignore[no-untyped-def]
            Watched.looks += len(self)
            return super().values()

        def items(self):  # type: ignore[no-untyped-def]
            Watched.looks += len(self)
            return super().items()

    book = CacheBook(10000, 2000)
    book._idle = Watched()
    for session in "abc":
        run(book, session, *((number, -1, 0, 1) for number in range(1000)))
        book._sessions[session] = Watched(book._sessions[session])
    Watched.looks = 0
    for kept in range(1, 11):
        run(book, "c", (0, 0, kept, 1))
    assert Watched.looks == 0
