"""Large receive buffers: never two's at a time, used again, and no more kept than allowed."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch

from splitfl import slabs
from splitfl.slabs import SMALLEST, Slabs
from splitfl.tensors import receive_buffer


def address(slab: Any) -> int:
    return int(slab.__array_interface__["data"][0])


def test_a_slab_is_used_again_once_nobody_holds_it_and_not_before() -> None:
    pool = Slabs()
    first = pool.take(SMALLEST)
    where, view = address(first), memoryview(first)
    del first
    assert address(other := pool.take(SMALLEST)) != where, "a view of it is still held"
    view.release()
    del view
    assert pool.idle == SMALLEST
    assert address(pool.take(SMALLEST - 1)) == where
    assert len(other) == SMALLEST


def test_a_tensor_and_whatever_views_it_hold_its_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Slabs()
    monkeypatch.setattr("splitfl.tensors.slabs", lambda: pool)
    tensor, view = receive_buffer(1024, 1024, torch.bfloat16)
    assert (tensor.shape, tensor.dtype, len(view)) == ((1024, 1024), torch.bfloat16, 2 * 2**20)
    view[:] = bytes(range(256)) * (len(view) // 256)
    assert bytes(tensor.view(torch.uint8).flatten()[:256].numpy()) == bytes(range(256))
    part = tensor.view(torch.uint8)[512:]
    copy = part.clone()
    del tensor, view
    gc.collect()
    assert pool.idle == 0
    assert torch.equal(part, copy)
    del part
    gc.collect()
    assert pool.idle == SMALLEST


def test_no_more_is_kept_than_allowed_and_what_fits_nobody_makes_room() -> None:
    pool = Slabs(4 * SMALLEST)
    held = [pool.take(SMALLEST) for _ in range(6)]
    held.clear()
    assert pool.idle == 4 * SMALLEST
    large = pool.take(3 * SMALLEST)
    assert pool.idle == SMALLEST, "it would never be kept beside what nobody uses"
    del large
    assert pool.idle == 4 * SMALLEST
    assert len(pool.take(SMALLEST + 1)) == SMALLEST + 1, "three times as large would be a waste, yet nothing else is kept"


def test_threads_never_get_the_same_slab() -> None:
    pool, wrong = Slabs(8 * SMALLEST), []

    def work(mark: int) -> None:
        for _ in range(200):
            slab = pool.take(SMALLEST)
            slab[:8] = mark
            slab[-8:] = mark
            if not (slab[:8] == mark).all() or not (slab[-8:] == mark).all():
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.idle <= 8 * SMALLEST


def test_the_process_has_one_pool() -> None:
    assert slabs.slabs() is slabs.slabs()


def test_a_view_of_a_view_holds_the_memory_too():
    slabs = Slabs()
    view = slabs.take(3 << 20)
    view[:] = 1
    view = view[:10]
    slabs.take(3 << 20)[:] = 2
    assert view.tolist() == [1] * 10
