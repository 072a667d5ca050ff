"""A client's side of rounds: what it says, sends and takes, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from client_ends.participant import Participant
from client_ends.rounds import EndsRounds
from splitfl.errors import ConfigError, RemoteProtocolError, SessionLost
from splitfl.protocol.messages import AveragePart, EndsPart, Enrol, RoundClosed, RoundOpened, StepClosed, StepOpened


def made(steps: int = 2) -> tuple[EndsRounds, dict[str, Parameter]]:
    ends = {"b": Parameter(torch.arange(6.0).view(2, 3)), "a": Parameter(torch.tensor([7.0]))}
    rounds = EndsRounds(steps, 8, lambda: ends)
    rounds.declare()
    return rounds, ends


def refuse(part: EndsPart, view: memoryview) -> None:
    raise AssertionError("nothing is to be sent")


def give(rounds: EndsRounds, number: int, value: float, *, parts: int | None = None) -> None:
    """The average of a round, all of it ``value``."""
    for tensor, offset, size in [(0, 0, 4), (1, 0, 8), (1, 8, 8), (1, 16, 8)][:parts]:
        message = AveragePart(number, tensor, offset, size)
        _, view = rounds.allocate(message)
        view[:] = torch.full((size // 4,), value).numpy().tobytes()
        rounds.arrived(message)


def test_what_is_sent_is_the_ends_in_order_and_not_a_copy():
    rounds, ends = made()
    sent: list[tuple[EndsPart, memoryview]] = []
    rounds.hear(RoundOpened(0), lambda part, view: sent.append((part, view)))
    assert [part for part, _ in sent] == [EndsPart(0, 0, 0, 4), *(EndsPart(0, 1, offset, 8) for offset in (0, 8, 16))]
    with torch.no_grad():
        ends["b"].fill_(1.0)
    assert b"".join(bytes(view) for _, view in sent[1:]) == torch.ones(6).numpy().tobytes()


def test_a_client_that_is_closing_sends_nothing_more():
    rounds, _ = made()
    sent: list[Any] = []

    def send(part: EndsPart, view: memoryview) -> None:
        sent.append(part)
        raise SessionLost("the session is closed", "closed")

    rounds.hear(RoundOpened(0), send)
    assert len(sent) == 1


def test_the_average_is_awaited_after_the_last_step_of_a_round_and_loaded_in_place():
    rounds, ends = made(steps=2)
    memory = ends["b"].data_ptr()
    rounds.step_ended(0)
    assert rounds.is_settled
    rounds.step_ended(1)
    assert not rounds.is_over
    give(rounds, 0, 5.0, parts=2)  # data may overtake the word
    rounds.hear(RoundClosed(0, 2, 9), refuse)
    assert rounds.is_over
    assert not rounds.is_settled
    for offset in (8, 16):
        message = AveragePart(0, 1, offset, 8)
        rounds.allocate(message)[1][:] = torch.full((2,), 5.0).numpy().tobytes()
        rounds.arrived(message)
    assert rounds.is_settled
    assert rounds.load()
    assert not rounds.load()
    assert ends["b"].data_ptr() == memory
    assert all(bool((one == 5.0).all()) for one in ends.values())
    assert rounds.loaded == 0


def test_a_round_without_members_leaves_the_ends_as_they_are():
    rounds, ends = made(steps=1)
    rounds.step_ended(0)
    rounds.hear(RoundClosed(0, 0, 0), refuse)
    assert rounds.is_settled
    assert not rounds.load()
    assert ends["a"].tolist() == [7.0]


def test_another_session_says_all_again_and_passes_over_what_the_ends_know():
    rounds, ends = made(steps=1)
    assert rounds.declare() is None
    rounds.step_ended(4)
    rounds.hear(RoundClosed(4, 1, 1), refuse)
    give(rounds, 4, 2.0)
    rounds.load()
    with torch.no_grad():
        ends["a"].fill_(3.0)  # it trains on
    rounds.begin_session()
    assert rounds.declare() is not None
    assert rounds.is_settled
    rounds.hear(RoundClosed(4, 1, 1), refuse)
    give(rounds, 4, 9.0)
    assert not rounds.load()
    assert ends["a"].tolist() == [3.0]


def test_a_run_that_went_back_gives_an_older_average_anew():
    rounds, ends = made(steps=1)
    for number in range(3):
        rounds.hear(RoundClosed(number, 1, 1), refuse)
        give(rounds, number, float(number))
        rounds.load()
    rounds.begin_session()
    rounds.declare()
    rounds.hear(RoundClosed(1, 1, 1), refuse)
    give(rounds, 1, 7.0)
    rounds.loaded = 0  # the ends were put back into the state of an earlier step
    assert rounds.is_settled
    assert rounds.load()
    assert ends["a"].tolist() == [7.0]


def test_a_round_that_is_due_when_the_link_breaks_stays_due_until_its_step_has_closed():
    rounds, _ = made(steps=2)
    rounds.step_ended(3)
    rounds.begin_session()
    assert not rounds.is_over
    rounds.stands_before(3)
    assert not rounds.is_over
    rounds.stands_before(4)
    assert rounds.is_over


@pytest.mark.parametrize("took_part", [True, False])
def test_an_average_that_was_announced_is_awaited_however_often_the_link_breaks(took_part):
    rounds, ends = made(steps=2)
    if took_part:
        rounds.step_ended(3)
    for parts in (0, 2, 3):  # of it in each session
        rounds.hear(RoundClosed(1, 2, 9), refuse)
        rounds.stands_before(4)  # where that session begins
        give(rounds, 1, 5.0, parts=parts)
        assert not rounds.is_settled
        rounds.begin_session()
        assert not rounds.is_over
        rounds.declare()
    rounds.hear(RoundClosed(1, 2, 9), refuse)
    give(rounds, 1, 5.0)
    assert rounds.is_settled
    assert rounds.load()
    rounds.begin_session()
    assert rounds.is_settled
    assert ends["a"].tolist() == [5.0]


def test_an_average_is_not_awaited_that_a_run_which_has_gone_back_behind_it_does_not_have():
    class Server:
        welcome = SimpleNamespace(config={"mode": "sync", "optimizer": {"steps": 0}})

        def tell(self, message: Any) -> None:
            """The link breaks as an average is announced; in the next session the run stands before it."""
            if isinstance(message, Enrol):
                rounds.hear(RoundClosed(7, 1, 1), refuse)
                rounds.begin_session()
                client._on_control(StepOpened(3, 1))

    client, (rounds, _) = Participant(), made(steps=1)
    client.rounds, client._channel = rounds, Server()  # type: ignore[assignment]
    assert client.enrol() == 3
    assert rounds.is_settled


def test_what_a_server_must_not_do_is_an_error():
    rounds, _ = made()
    with pytest.raises(RemoteProtocolError, match="out of order"):
        rounds.allocate(AveragePart(0, 1, 0, 8))
    silent = EndsRounds(1, 8, dict)
    with pytest.raises(RemoteProtocolError, match="never spoke of"):
        silent.hear(RoundOpened(0), refuse)
    with pytest.raises(RemoteProtocolError, match="does not await"):
        silent.allocate(AveragePart(0, 0, 0, 4))


def test_frozen_ends_have_nothing_to_average():
    with pytest.raises(ConfigError, match="use --ends lora or full"):
        EndsRounds(1, 8, dict).declare()


def test_who_pauses_when_the_run_went_on_without_it_awaits_no_round():
    client = Participant()
    client.rounds, _ = made(steps=1)
    client.rounds.step_ended(0)
    client._dropped = StepClosed(0, 5, 1, 0.1, None, dropped=True)  # it crossed this client's StepDone
    client.pause()
    assert client.rounds.is_over


def test_the_rest_of_an_average_that_a_lost_session_began_is_passed_over():
    rounds, _ = made()
    message = AveragePart(0, 0, 0, 4)
    rounds.allocate(message)
    rounds.begin_session()
    rounds.arrived(message)
    rounds.hear(RoundClosed(0, 1, 1), refuse)
    assert not rounds.is_settled
