"""A replica's way to the others: who opens its endpoint when."""

from __future__ import annotations

import pytest

from server_trunk.replicas.place import Place
from server_trunk.replicas.replica import Replica
from splitfl.config import build_config
from splitfl.protocol.messages import Redirect


class Alone:
    """What a replica asks of its group, without the others."""

    control = None

    def __init__(self, rank: int, order: list[str]) -> None:
        self.rank, self.size, self.place = rank, 2, Place(rank, 2)
        self._order = order

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: tuple[int, str, int]) -> list[tuple[int, str, int]]:
        self._order.append("the others")
        return [value if self.is_first else (0, "", 0), (0, "there", 7)]


@pytest.mark.parametrize(("rank", "order"), [(0, ["the others", "open"]), (1, ["open", "the others"])])
def test_rank_0_opens_last_so_that_it_can_send_on_its_first_client_at_once(monkeypatch, rank, order):
    seen: list[str] = []
    monkeypatch.setattr("server_trunk.replicas.control.Control.start", lambda control: None)
    replica = Replica(build_config({"model": "m", "mode": "hierarchical", "replicas": 2}), Alone(rank, seen))  # type: ignore[arg-type]
    sent: list[Redirect | None] = []

    def serve() -> tuple[str, int]:
        seen.append("open")
        sent.extend(replica.redirect(client) for client in "ab")  # they have waited for it
        return "there", 7

    replica.meet(serve, wake=lambda: None, loads=dict)
    assert seen == order
    assert sent == ([None, Redirect("", 7)] if rank == 0 else [None, None])
