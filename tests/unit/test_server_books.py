"""What a server holds against the run of what a client says of its adapter and its ends; and those ends as they travel."""

from __future__ import annotations

import pytest
import torch

from server_trunk.adapter_book import AdapterBook, AdapterSettings
from server_trunk.ends_book import EndsBook
from splitfl.adapters.layout import Layout, PartCursor, part_bytes_for
from splitfl.config import build_config
from splitfl.errors import Refused, RemoteProtocolError
from splitfl.protocol import messages as m

OWN = build_config({"model": "m", "adapters": "per-client", "limits.max_rank": 16, "limits.max_learning_rate": 0.01})


# --- adapters -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"rank": 17}, "rank 17 is above this run's limit: ask for at most 16"),
        ({"rank": 9}, "rank 9 is above your key's limit: ask for at most 8"),
        ({"learning_rate": 0.02}, "learning rate 0.02 is above this run's limit: ask for at most 0.01"),
        ({"rank": 0}, "rank is a whole number from 1, not '0'"),
        ({"rank": True}, "rank is a whole number from 1, not 'True'"),
        ({"alpha": 0}, "alpha is a number above 0"),
        ({"learning_rate": float("nan")}, "learning rate is a number from 0, not 'nan'"),
        ({"colour": 1}, "no setting 'colour'"),
    ],
)
def test_an_adapter_that_nobody_gets(asked, said):
    with pytest.raises(Refused, match=said):
        AdapterBook(OWN).agree("a", asked, max_rank=8)


def test_an_adapters_rank_is_fixed_once_it_is_in_use_or_has_trained():
    book = AdapterBook(OWN)
    book.settle("s", "a", {"rank": 4, "alpha": 2, "learning_rate": 1e-3})
    assert book.of("a") == AdapterSettings(4, 2.0, 1e-3, 0.0)
    with pytest.raises(Refused, match="has rank 4 and alpha 2, and keeps them"):
        book.agree("a", {"rank": 5})
    assert book.agree("a", {"learning_rate": 2e-3}).learning_rate == 2e-3
    book.left("s")
    assert book.agree("a", {"rank": 5}).rank == 5, "it has not trained"
    book.trained("a")
    with pytest.raises(Refused):
        book.agree("a", {"alpha": 3})
    other = AdapterBook(OWN)
    other.restore("a", book.plain("a"))
    assert other.of("a") == book.of("a")
    with pytest.raises(Refused):
        other.agree("a", {"rank": 5})


# --- ends -----------------------------------------------------------------------------------------------------------------------

ENDS = m.Ends((("a", ("float32", (2, 8))), ("b", ("bfloat16", (3,)))))
OTHERS = m.Ends((("a", ("float32", (2, 9))), ("b", ("bfloat16", (3,)))))


def part(number: int, tensor: int, offset: int, size: int) -> m.EndsPart:
    return m.EndsPart(number, tensor, offset, size)


def book_of(*sessions: str) -> EndsBook:
    book = EndsBook(averaged=True, part_bytes=64)
    for session in sessions:
        book.declare(session, ENDS)
    return book


def test_the_first_who_says_what_it_trains_says_it_for_all():
    book = book_of("a")
    with pytest.raises(
        Refused, match=r"yours are full weights .* a is float32 \[2, 9\] in yours, float32 \[2, 8\] in the others"
    ):
        book.declare("b", OTHERS)
    with pytest.raises(RemoteProtocolError, match="Enrol before Ends"):
        book.check_enrol("b")
    book.check_enrol("a")
    with pytest.raises(RemoteProtocolError, match="nobody asked for"):
        book.declare("a", ENDS)
    with pytest.raises(RemoteProtocolError, match="nobody asked for"):
        EndsBook(averaged=False, part_bytes=64).declare("a", ENDS)


def test_what_was_said_is_forgotten_with_the_last_who_said_it_unless_it_is_needed():
    book = book_of("a")
    book.hold()
    book.left("a")
    assert book.layout is not None, "a round is open"
    book.let_go()
    assert book.layout is None
    book.declare("b", OTHERS)
    mine = Layout.from_messages([ENDS])
    assert book.keep(mine) == ["b"], "an average of other ends was made elsewhere"
    book.left("b")
    book.let_go()
    assert book.layout == mine, "an average of them is kept"


def test_more_tensors_than_any_model_has():
    book = book_of()
    for number in range(256):
        book.declare("a", m.Ends(((f"{number:04}", ("float32", (1,))),), more=True))
    with pytest.raises(RemoteProtocolError, match="more tensors of the ends than any model has"):
        book.declare("a", m.Ends((("x", ("float32", (1,))),), more=True))


def test_parts_come_in_order_and_only_when_asked_for():
    book = book_of("a")
    with pytest.raises(RemoteProtocolError, match="ends for round 0, which nobody asked for"):
        book.begin("a", part(0, 0, 0, 64))
    book.ask("stranger", 0)
    book.ask("a", 0)
    book.ask("a", 1)
    book.begin("a", part(0, 0, 0, 64))
    with pytest.raises(RemoteProtocolError, match="out of order: tensor 0 from 0"):
        book.begin("a", part(0, 0, 0, 64))
    book.begin("a", part(0, 1, 0, 6))
    with pytest.raises(RemoteProtocolError, match="round 0"):
        book.begin("a", part(0, 0, 0, 64))
    book.begin("a", part(1, 0, 0, 64))
    with pytest.raises(RemoteProtocolError):
        book.begin("stranger", part(0, 0, 0, 64))


# --- ends as they travel --------------------------------------------------------------------------------------------------------


def test_a_layout_comes_back_from_messages_and_from_bytes():
    tensors = {f"{index:03}.lora_A.weight": torch.zeros(2, index + 1) for index in range(130)}
    tensors["z"] = torch.zeros(3, dtype=torch.bfloat16)
    layout = Layout.of(tensors)
    messages = layout.messages()
    assert [message.more for message in messages] == [True, False]
    assert Layout.from_messages(messages) == layout == Layout.from_bytes(layout.to_bytes())
    assert layout.bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    ends = [begin + spec.bytes for begin, spec in zip(layout.offsets, layout.tensors, strict=True)]
    assert layout.offsets == [0, *ends[:-1]]
    assert ends[-1] == layout.bytes
    assert layout.describe() == f"LoRA of rank 2 (131 tensors, {layout.bytes} bytes)"
    with pytest.raises(ValueError, match="complex"):
        Layout.of({"a": torch.zeros(1, dtype=torch.complex64)})


def test_where_two_layouts_differ_first():
    one, more = Layout.from_messages([ENDS]), Layout.from_messages([m.Ends(ENDS.tensors[:1])])
    assert one.difference(one) is None
    assert one.difference(more) == "b is in the others alone"
    assert more.difference(one) == "b is in yours alone"
    assert one.difference(Layout.from_messages([OTHERS])) == "a is float32 [2, 9] in yours, float32 [2, 8] in the others"


@pytest.mark.parametrize("window", [4 << 20, 64 << 20])
def test_parts_cover_each_tensor_once_and_fit_a_window_several_times(window):
    size = part_bytes_for(window)
    assert size % 8 == 0
    assert 4 * size <= window
    layout = Layout.of({"a": torch.zeros(3_000_001), "b": torch.zeros(0), "c": torch.zeros(1, dtype=torch.float64)})
    parts = list(layout.parts(size))
    for index, spec in enumerate(layout.tensors):
        own = [(offset, length) for tensor, offset, length in parts if tensor == index]
        assert [offset for offset, _ in own] == [place * size for place in range(len(own))]
        assert sum(length for _, length in own) == spec.bytes
    cursor = PartCursor(layout, size)
    for each in parts:
        assert not cursor.at_end
        cursor.take(part(0, *each))
    assert cursor.at_end
