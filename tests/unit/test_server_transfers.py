"""Answers leave in order, when they are whole; where a copy fails, whoever sends the next one hears of it."""

import threading

import pytest
import torch

from server_trunk.transfers import Landing, Mailer, Transfers


def landing(wait=None):
    return Landing([torch.zeros(1)], lambda: 0.0, wait)


def test_what_has_landed_leaves_at_once_and_what_has_not_does_not_hold_up_its_sender():
    mailer, left, landed, sent = Mailer(depth=2), [], threading.Event(), threading.Event()
    mailer.send(landing(), lambda: left.append(0))
    assert left == [0]
    mailer.send(landing(landed.wait), lambda: left.append(1))
    # It has landed already, but does not overtake what was sent before it.
    mailer.send(landing(), lambda: (left.append(2), sent.set()))
    assert left == [0]
    landed.set()
    assert sent.wait(10)
    mailer.close()
    assert left == [0, 1, 2]


def test_a_failed_copy_is_raised_to_the_next_sender_and_nobody_hangs():
    failed = threading.Event()
    mailer = Mailer(failed.set, depth=1)

    def fail():
        raise RuntimeError("the device is gone")

    mailer.send(landing(fail), lambda: None)
    assert failed.wait(10)
    with pytest.raises(RuntimeError, match="the device is gone"):
        mailer.check()

    def send_on():
        for _ in range(1000):
            mailer.send(landing(), lambda: None)

    with pytest.raises(RuntimeError, match="the device is gone"):
        send_on()
    mailer.close()


def test_on_a_cpu_nothing_is_copied(monkeypatch):
    monkeypatch.setattr("server_trunk.transfers.time.perf_counter", iter((1.0, 3.5)).__next__)
    transfers, tensor = Transfers(torch.device("cpu")), torch.zeros(3, 4)
    began = transfers.begin()
    assert transfers.up(tensor) is tensor
    landed = transfers.down([tensor, None], began)
    assert landed.tensors[0].data_ptr() == tensor.data_ptr()
    assert landed.tensors[1] is None
    assert landed.wait is None
    assert landed.took() == 2.5
