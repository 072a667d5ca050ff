"""Who is in a round, what it weighs, and what a client may say and send of its ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from server_trunk.averaging import Averager, Done, Whole
from server_trunk.ends_book import EndsBook
from server_trunk.ledger import Ledger, Part
from server_trunk.roundkeeper import RoundKeeper
from server_trunk.rounds import Rounds
from splitfl.adapters.layout import Layout, PartCursor, part_bytes_for
from splitfl.errors import Refused, RemoteProtocolError
from splitfl.protocol.messages import Ends, EndsPart, Fault, RoundClosed, RoundOpened, StepDone


def ledger(step: int, **targets: int) -> Ledger:
    """Of sessions ``a1``, ``a2`` of client ``a`` and so on."""
    return Ledger(step, {name: Part(name, name[0], targets=count) for name, count in targets.items()})


def layout_of(**shapes: tuple[int, ...]) -> Layout:
    return Layout.of({name: torch.zeros(shape) for name, shape in shapes.items()})


def test_a_member_weighs_what_counted_since_the_last_round():
    rounds = Rounds(steps=2)
    here = {"a1": "a", "b1": "b", "c1": "c"}
    rounds.count(ledger(0, a1=3, b1=5), here)
    assert not rounds.ends_with(0)
    assert rounds.ends_with(1)
    rounds.count(ledger(1, a1=4, c1=0), here)
    assert rounds.open(1, here) == {"a1": 7, "b1": 5}
    assert rounds.number == 0
    assert rounds.awaits("a1", 0)
    assert not rounds.awaits("a1", 1)
    assert not rounds.awaits("c1", 0)
    rounds.whole("a1", 0.0)
    assert not rounds.is_gathered
    rounds.lose("b1")
    assert rounds.is_gathered
    assert rounds.weights == {"a1": 7}
    rounds.lose("a1")  # whole before it was lost
    assert rounds.weights == {"a1": 7}
    rounds.close()
    rounds.count(ledger(3, a1=1), here)
    assert rounds.open(3, here) == {"a1": 1}


def test_a_round_ends_after_so_many_steps():
    assert [step for step in range(9) if Rounds(steps=3).ends_with(step)] == [2, 5, 8]


def test_who_others_have_waited_for_too_long_is_late():
    rounds = Rounds(steps=1, deadline=5.0)
    here = {"a1": "a", "b1": "b"}
    rounds.count(ledger(0, a1=1, b1=1), here)
    rounds.open(0, here)
    assert rounds.wake(100.0) is None  # nobody waits for anybody
    assert rounds.overdue(100.0) == []
    rounds.whole("b1", 100.0)
    assert rounds.wake(102.0) == 3.0
    assert rounds.overdue(104.9) == []
    assert rounds.overdue(105.0) == ["a1"]
    elsewhere = Rounds(steps=1, deadline=5.0, alone=False)  # others wait on another replica
    elsewhere.count(ledger(0, a1=1), here)
    elsewhere.open(0, here, 100.0)
    assert elsewhere.overdue(105.0) == ["a1"]


@pytest.mark.parametrize(("goes_on", "weight"), [(True, 7), (False, 4)])
def test_what_a_lost_session_counted_is_its_clients_if_that_goes_on_from_it(goes_on, weight):
    rounds = Rounds(steps=2)
    rounds.count(ledger(0, a1=3, b1=5), {"a1": "a", "b1": "b"})
    rounds.lose("a1")
    assert rounds.targets == {"a": 3, "b": 5}
    rounds.joins("a2", goes_on=goes_on)
    here = {"a2": "a", "b1": "b"}
    rounds.count(ledger(1, a2=4), here)
    assert rounds.open(1, here) == {"a2": weight, "b1": 5}
    assert rounds.targets == {}


def test_under_wait_a_lost_member_is_waited_for_if_it_was_to_go_on():
    rounds = Rounds(steps=1, deadline=5.0, on_loss="wait")
    here = {"a1": "a", "b1": "b", "c1": "c"}

    def lost() -> None:
        rounds.count(ledger(0, a1=3, b1=2, c1=1), here)
        rounds.open(0, here, 90.0, stay=["a1", "c1"])
        rounds.withdraw("c1")
        for session in here:
            rounds.lose(session, 100.0)
        assert rounds.waits_for("a")
        assert not rounds.waits_for("b")
        assert not rounds.waits_for("c")
        assert not rounds.is_gathered
        assert rounds.wake(101.0) == 4.0

    lost()
    assert rounds.give_up(104.0) == []
    assert rounds.returns("a2", "a", holds=True) == 3
    rounds.lose("a2", 104.0)
    assert rounds.waits_for("a")
    assert rounds.returns("a2", "a", holds=True) == 3
    assert rounds.awaits("a2", 0)
    rounds.whole("a2", 106.0)
    assert rounds.is_gathered
    assert rounds.weights == {"a2": 3}
    lost()
    assert rounds.returns("a2", "a", holds=False) == 0
    assert rounds.is_gathered
    assert rounds.weights == {}
    lost()
    assert rounds.give_up(105.0) == ["a"]
    assert rounds.is_gathered


def test_what_counted_on_another_replica_comes_along_with_its_client():
    rounds = Rounds(steps=4)
    rounds.count(ledger(0, a1=3), {"a1": "a"})  # amid a meeting of two steps
    met = ledger(1, a1=4)
    met.met = {"a": 7, "b": 9}
    rounds.count(met, {"a1": "a"})
    assert rounds.targets == {"a": 7, "b": 9}
    rounds.joins("b5", goes_on=True)
    rounds.count(ledger(3, b5=1), {"a1": "a", "b5": "b"})
    assert rounds.open(3, {"a1": "a", "b5": "b"}) == {"a1": 7, "b5": 10}


def test_targets_are_taken_up_again_with_the_run():
    rounds = Rounds(steps=2)
    rounds.count(ledger(5, b9=7), {"b9": "b"})  # of a step that the run has undone
    rounds.joins("a9", goes_on=True)
    rounds.targets = {"a": 3, "b": 5}
    here = {"a9": "a", "b9": "b"}
    rounds.count(ledger(3, a9=1, b9=1), here)
    assert rounds.open(3, here) == {"a9": 4, "b9": 1}


def test_a_session_lost_before_its_step_closed_counts_for_its_client():
    rounds = Rounds(steps=1)
    rounds.count(ledger(0, a1=3, b1=2), {"b1": "b"})
    assert rounds.open(0, {"b1": "b"}) == {"b1": 2}


def test_parts_cover_every_tensor_in_order():
    layout = layout_of(b=(3, 5), a=(2,), c=())
    assert [spec.name for spec in layout.tensors] == ["a", "b", "c"]
    assert list(layout.parts(32)) == [(0, 0, 8), (1, 0, 32), (1, 32, 28), (2, 0, 4)]
    assert layout.bytes == 72
    assert layout.offsets == [0, 8, 68]
    assert Layout.from_messages(layout.messages()) == layout
    cursor = PartCursor(layout, 32)
    for tensor, offset, size in layout.parts(32):
        assert not cursor.at_end
        cursor.take(EndsPart(0, tensor, offset, size))
    assert cursor.at_end
    with pytest.raises(RemoteProtocolError, match="out of order"):
        cursor.take(EndsPart(0, 0, 0, 8))


def test_many_tensors_are_said_in_several_messages():
    layout = layout_of(**{f"t{index:04d}": (1,) for index in range(300)})
    messages = layout.messages()
    assert [message.more for message in messages] == [True, True, False]
    assert Layout.from_messages(messages) == layout
    assert part_bytes_for(1 << 20) == 256 << 10
    assert part_bytes_for(1 << 30) == 4 << 20


def book(**shapes: tuple[int, ...]) -> EndsBook:
    made = EndsBook(averaged=True, part_bytes=8)
    for message in layout_of(**shapes).messages():
        made.declare("one", message)
    return made


def test_the_first_client_says_what_all_train_until_nobody_is_left():
    made = book(a=(4,))
    with pytest.raises(Refused, match=r"a is float32 \[5\] in yours, float32 \[4\] in the others; use the same --ends"):
        made.declare("two", layout_of(a=(5,)).messages()[0])
    with pytest.raises(Refused, match="b is in yours alone"):
        made.declare("three", layout_of(a=(4,), b=(1,)).messages()[0])
    with pytest.raises(RemoteProtocolError, match="Enrol before Ends"):
        made.check_enrol("two")
    made.check_enrol("one")
    made.left("one")
    made.declare("two", layout_of(a=(5,)).messages()[0])
    made.keep(layout_of(a=(5,)))
    made.left("two")
    with pytest.raises(Refused):
        made.declare("one", layout_of(a=(4,)).messages()[0])


def test_what_is_on_its_way_in_a_round_is_of_one_layout_though_all_leave():
    made = book(a=(4,))
    made.hold()
    made.left("one")
    with pytest.raises(Refused):
        made.declare("two", layout_of(a=(5,)).messages()[0])
    made.let_go()
    made.declare("two", layout_of(a=(5,)).messages()[0])
    made.hold()
    made.let_go()
    assert made.layout == layout_of(a=(5,))


class Told:
    """An outlet, an averager and a log in one: what they are told is kept."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.closed: list[str] = []  # sessions that were told that a round is over
        self.rounds: list[dict[str, Any]] = []  # what the log says of them
        self.news: list[Whole | Done] = []

    def end(self, session: str, fault: Fault) -> None:
        assert "use the same --ends" in fault.text
        self.ended.append(session)

    def tell(self, session: str, message: RoundOpened | RoundClosed) -> None:
        if isinstance(message, RoundClosed):
            self.closed.append(session)

    def write(self, *event: Any, **fields: Any) -> None:
        if event == ("round",):
            self.rounds.append(fields)

    def take(self) -> list[Whole | Done]:
        news, self.news = self.news, []
        return news

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **fields: None


def test_all_who_train_other_ends_than_another_replica_hear_it_in_words(tmp_path):
    """Also those who came after the round's last step: the average would break their session otherwise."""
    made, told = book(a=(4,)), Told()
    made.declare("late", layout_of(a=(4,)).messages()[0])
    keeper = RoundKeeper(Rounds(steps=1), told, made, told, told)  # type: ignore[arg-type]
    keeper.names = {"one": "first", "late": "second"}
    part = Part("one", "first", targets=3)
    part.done = StepDone(0, 1, 1, "continue")
    keeper.step_closed(Ledger(0, {"one": part}))
    averager = Averager(tmp_path, credit=lambda session, size: None, tell=lambda: None)
    told.news = [Done(averager.restore(0, {"a": torch.zeros(5)}), 1, 7, fits=False)]
    keeper.turn()
    assert sorted(told.ended) == ["late", "one"]
    averager.close()


def test_who_goes_to_another_replica_is_told_nothing_of_the_round_and_may_have_been_late():
    rounds, told = Rounds(steps=1, deadline=5.0), Told()
    keeper = RoundKeeper(rounds, told, book(a=(4,)), told, told)  # type: ignore[arg-type]
    keeper.names = {"one": "one", "two": "two"}
    done = StepDone(0, 1, 1, "continue")
    keeper.step_closed(Ledger(0, {name: Part(name, name, targets=7, done=done) for name in keeper.names}))
    rounds.lose("one")
    told.news = [Done(None, 1, 7)]
    keeper.turn()
    keeper.departs("one")
    keeper.tell()
    assert told.closed == ["two"]
    keeper.forget("one")


def test_the_log_counts_the_averages_that_are_given_and_no_others(tmp_path):
    averager, told = Averager(tmp_path, credit=lambda session, size: None, tell=lambda: None), Told()
    keeper = RoundKeeper(Rounds(steps=1), told, book(a=(4,)), told, told)  # type: ignore[arg-type]
    keeper.names = {name: name for name in ("stays", "moves", "comes")}
    for step in range(2):
        done = StepDone(step, 1, 1, "continue")
        parts = {name: Part(name, name, targets=7, done=done) for name in ("stays", "moves") if step == 0 or name == "stays"}
        keeper.step_closed(Ledger(step, parts))
        told.news = [Done(averager.restore(step, {"a": torch.zeros(4)}), len(parts), 7 * len(parts))]
        keeper.turn()
        if step == 0:
            keeper.departs("moves")
        keeper.tell()
        if step == 0:
            keeper.bring_up("comes")
            keeper.bring_up("comes")
            keeper.bring_up("stays")
    averager.close()
    assert [event["members"] for event in told.rounds] == [{"moves": 7, "stays": 7}, {"stays": 7}]
    assert [event["bytes_sent"] for event in told.rounds] == [16, 32]


def test_who_returns_to_a_round_has_the_whole_deadline_again():
    rounds = Rounds(steps=1, deadline=5.0, on_loss="wait")
    here = {"a1": "a", "b1": "b"}
    rounds.count(ledger(0, a1=1, b1=1), here)
    rounds.open(0, here, stay=here)
    rounds.whole("b1", 0.0)
    rounds.lose("a1", 3.0)
    assert rounds.returns("a2", "a", 6.0, holds=True) == 1
    assert rounds.overdue(10.0) == []
    assert rounds.overdue(11.0) == ["a2"]


def test_what_nobody_asked_for_ends_the_session():
    made = book(a=(4,))
    with pytest.raises(RemoteProtocolError, match="nobody asked"):
        made.begin("one", EndsPart(0, 0, 0, 8))
    made.ask("one", 3)
    with pytest.raises(RemoteProtocolError, match="nobody asked"):
        made.begin("one", EndsPart(2, 0, 0, 8))
    made.begin("one", EndsPart(3, 0, 0, 8))
    with pytest.raises(RemoteProtocolError, match="out of order"):
        made.begin("one", EndsPart(3, 0, 0, 8))
    made.begin("one", EndsPart(3, 0, 8, 8))
    with pytest.raises(RemoteProtocolError, match="nobody asked"):
        made.begin("one", EndsPart(3, 0, 16, 8))
    with pytest.raises(RemoteProtocolError, match="nobody asked"):
        made.declare("one", layout_of(a=(4,)).messages()[0])
    personal = EndsBook(averaged=False, part_bytes=8)
    with pytest.raises(RemoteProtocolError):
        personal.declare("one", layout_of(a=(4,)).messages()[0])
    personal.check_enrol("one")
    with pytest.raises(RemoteProtocolError, match="ascending"):
        EndsBook(averaged=True, part_bytes=8).declare("one", Ends((("b", ("float32", (1,))), ("a", ("float32", (1,))))))
