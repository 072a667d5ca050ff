"""Ends on disk until they are whole, and the mean of them: here, and over replicas."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from server_trunk.averaging import Averager, Done, Whole
from splitfl.adapters.layout import Layout
from splitfl.errors import NotWritten
from splitfl.protocol.messages import EndsPart
from splitfl.tensors import byte_view
from tests.integration.test_lost import wait_for


class Sums:
    """An averager whose credit and news are kept."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.credit: dict[str, int] = {}
        self.averager = Averager(directory, credit=self._give, tell=lambda: None, **options)

    def _give(self, session: str, size: int) -> None:
        self.credit[session] = self.credit.get(session, 0) + size

    def send(self, session: str, tensors: dict[str, torch.Tensor], parts: int | None = None) -> Layout:
        layout = Layout.of(tensors)
        for tensor, offset, size in list(layout.parts(64))[:parts]:
            content = bytes(byte_view(tensors[layout.tensors[tensor].name].contiguous()))[offset : offset + size]
            payload = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(1, size)
            self.averager.write(session, layout, EndsPart(0, tensor, offset, size), payload)
        return layout

    def news(self, count: int) -> list[Whole | Done]:
        found: list[Whole | Done] = []

        def enough() -> bool:
            found.extend(self.averager.take())
            return len(found) >= count

        wait_for(enough)
        return found


def ends(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(7, 11, generator=draw),
        "b": torch.randn(33, generator=draw).bfloat16(),
        "c": torch.randn(3, generator=draw, dtype=torch.float64),
    }


def test_the_mean_is_weighted_and_in_each_tensors_own_type(tmp_path, monkeypatch):
    monkeypatch.setattr("server_trunk.averaging._SLICE", 10)
    sums = Sums(tmp_path)
    layout = sums.send("x", ends(0))
    sums.send("y", ends(1))
    sums.send("gone", ends(2), parts=3)
    sums.averager.discard("gone")
    assert sums.news(2) == [Whole("x"), Whole("y")]
    sums.averager.average(4, layout, {"x": 3, "y": 1})
    (done,) = sums.news(1)
    assert isinstance(done, Done)
    assert done.average is not None
    assert done.average.number == 4
    for name, mean in done.average.tensors().items():
        one, other = ends(0)[name], ends(1)[name]
        plain = (one.double() * 0.75 + other.double() * 0.25).to(one.dtype)
        assert torch.allclose(mean, plain, rtol=0, atol={torch.bfloat16: 1e-2, torch.float32: 1e-6}.get(one.dtype, 1e-15))
    assert sums.credit["x"] == sums.credit["y"] == layout.bytes
    assert not sums.averager._uploads
    assert not list(tmp_path.iterdir())  # files have no names, and go with the process
    again = sums.averager.restore(4, done.average.tensors())
    assert bytes(again.memory) == bytes(done.average.memory)
    sums.averager.close()


class Joined:
    """Replicas that are threads: each hands in its tensors and gets the sums."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.tensors: list[Sequence[torch.Tensor]] = [()] * size

    def place(self, rank: int) -> Any:
        return _Place(self, rank)


class _Place:
    def __init__(self, joined: Joined, rank: int) -> None:
        self._joined, self.rank, self.size = joined, rank, joined.size

    def all_reduce_tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        joined = self._joined
        joined.tensors[self.rank] = tensors
        joined.barrier.wait(20)
        sums = [sum(each[1:], each[0].clone()) for each in zip(*joined.tensors, strict=True)]
        joined.barrier.wait(20)
        for tensor, total in zip(tensors, sums, strict=True):
            tensor.copy_(total)


@pytest.mark.parametrize("fits", [True, False])
def test_one_average_is_made_of_all_replicas(tmp_path, monkeypatch, fits):
    """One with a client, one with two, one that never had any."""
    monkeypatch.setattr("server_trunk.averaging._SLICE", 50)
    joined = Joined(3)
    first, second, third = (Sums(tmp_path, replicas=joined.place(rank)) for rank in range(3))
    layout = second.send("x", ends(0))
    theirs = {name: value for name, value in ends(1).items() if fits or name != "a"}
    other = third.send("y", theirs)
    third.send("z", {name: ends(2)[name] for name in theirs})
    second.news(1)
    third.news(2)
    first.averager.average(0, None, {})
    second.averager.average(0, layout, {"x": 3})
    third.averager.average(0, other, {"y": 1, "z": 4})
    done = [sums.news(1)[0] for sums in (first, second, third)]
    weights = {0: 3, 1: 1, 2: 4} if fits else {0: 3}
    plain = sum(ends(seed)["a"].double() * (weight / sum(weights.values())) for seed, weight in weights.items())
    for each in done:
        assert isinstance(each, Done)
        assert each.average is not None
        assert (each.members, each.targets) == (len(weights), sum(weights.values()))
        assert torch.allclose(each.average.tensors()["a"].double(), plain, rtol=0, atol=1e-6)
    assert [each.fits for each in done if isinstance(each, Done)] == [True, True, fits]
    for sums in (first, second, third):
        sums.averager.close()


def test_a_disk_that_is_full_leaves_that_client_out(tmp_path, monkeypatch):
    sums = Sums(tmp_path)

    class Full:
        def seek(self, offset: int) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            pass

    monkeypatch.setattr(sums.averager, "_file", Full)
    sums.send("x", ends(0))
    (whole,) = sums.news(1)
    assert whole == Whole("x", "not kept: No space left on device")
    sums.averager.close()


def test_a_disk_that_is_full_by_the_last_part_is_noticed_before_the_average(tmp_path, monkeypatch):
    sums = Sums(tmp_path)

    class FullAtLast:
        def seek(self, offset: int) -> None:
            pass

        def write(self, content: memoryview) -> None:
            pass

        def flush(self) -> None:
            raise OSError(28, "No space left on device")

        close = flush

    monkeypatch.setattr(sums.averager, "_file", FullAtLast)
    sums.send("x", ends(0))
    assert sums.news(1) == [Whole("x", "not kept: No space left on device")]
    sums.averager.discard("x")
    sums.averager.average(0, None, {})
    assert sums.news(1) == [Done(None, 0, 0)]
    sums.averager.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is Linux's")
def test_an_average_that_does_not_fit_ends_the_run_in_a_sentence(tmp_path, monkeypatch):
    """A member's ends did, so this is nobody's fault: the server ends, clients wait until there is room."""
    sums = Sums(tmp_path)
    layout = sums.send("x", ends(0))
    assert sums.news(1) == [Whole("x")]
    monkeypatch.setattr(sums.averager, "_file", functools.partial(open, "/dev/full", "w+b"))
    sums.averager.average(0, layout, {"x": 3})
    with pytest.raises(NotWritten, match=r"average of the clients' ends in .* \(No space left on device\): make room"):
        sums.news(1)
    with pytest.raises(NotWritten, match="make room"):
        sums.averager.restore(0, ends(0))
    sums.averager.close()


def test_nobodys_ends_are_no_average(tmp_path):
    sums = Sums(tmp_path)
    sums.averager.average(0, None, {})
    assert sums.news(1) == [Done(None, 0, 0)]
    sums.averager.close()
    with pytest.raises(RuntimeError):
        sums.averager.take()
