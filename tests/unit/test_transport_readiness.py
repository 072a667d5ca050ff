"""Which sockets have something: nothing that has come is overlooked, whoever took the news of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import zmq

from splitfl.transport.readiness import Readiness
from splitfl.transport.zmq_common import Wake

Socket = zmq.Socket[bytes]


@pytest.fixture
def pair() -> Iterator[tuple[Socket, Socket]]:
    context: zmq.Context[Socket] = zmq.Context()
    ends = (context.socket(zmq.DEALER), context.socket(zmq.DEALER))
    for end in ends:
        end.setsockopt(zmq.SNDHWM, 1)
        end.setsockopt(zmq.RCVHWM, 1)
    ends[0].bind("inproc://readiness")
    ends[1].connect("inproc://readiness")
    yield ends
    context.destroy(0)


@pytest.fixture
def wake() -> Iterator[Wake]:
    one = Wake()
    yield one
    one.close()


def test_what_came_before_it_was_registered(pair: tuple[Socket, Socket], wake: Wake) -> None:
    near, far = pair
    far.send(b"early")
    near.getsockopt(zmq.EVENTS)  # takes the news of it
    readiness = Readiness(wake)
    readiness.register(near)
    assert readiness.poll(10.0) == {near: zmq.POLLIN}


def test_a_socket_that_was_not_emptied_is_ready_again(pair: tuple[Socket, Socket], wake: Wake) -> None:
    near, far = pair
    readiness = Readiness(wake)
    readiness.register(near)
    assert readiness.poll(0.0) == {}
    for said in (b"one", b"two"):
        far.send(said)
    for said in (b"one", b"two"):
        assert readiness.poll(10.0) == {near: zmq.POLLIN}
        assert near.recv(zmq.NOBLOCK) == said
    assert readiness.poll(0.0) == {}
    far.send(b"three")
    assert readiness.poll(10.0) == {near: zmq.POLLIN}


def test_news_that_something_else_took(pair: tuple[Socket, Socket], wake: Wake) -> None:
    near, far = pair
    readiness = Readiness(wake)
    readiness.register(near)
    assert readiness.poll(0.0) == {}
    far.send(b"meanwhile")
    readiness.touch(near)
    near.send(b"whatever is done with a socket may take the news")
    near.getsockopt(zmq.EVENTS)
    assert readiness.poll(10.0) == {near: zmq.POLLIN}


def test_one_poll_tells_of_all_whether_something_was_done_with_them_or_not(pair: tuple[Socket, Socket], wake: Wake) -> None:
    near, far = pair
    readiness = Readiness(wake)
    for end in pair:
        readiness.register(end)
    assert readiness.poll(0.0) == {}
    far.send(b"for one that is asked")
    readiness.touch(far)
    assert readiness.poll(0.0) == {near: zmq.POLLIN}
    near.send(b"news for one that is watched")
    readiness.touch(near)
    assert readiness.poll(10.0) == {near: zmq.POLLIN, far: zmq.POLLIN}
    assert (near.recv(zmq.NOBLOCK), far.recv(zmq.NOBLOCK)) == (b"for one that is asked", b"news for one that is watched")
    readiness.touch(near)
    wake.set()
    assert readiness.poll(60.0) == {}
    far.send(b"later")
    assert readiness.poll(10.0) == {near: zmq.POLLIN}


def test_room_is_told_where_it_is_wanted(pair: tuple[Socket, Socket], wake: Wake) -> None:
    near, far = pair
    readiness = Readiness(wake)
    readiness.register(near)
    assert readiness.poll(0.0) == {}, "there is room, and nobody asked for it"
    near.send(b"x", zmq.NOBLOCK)
    near.send(b"x", zmq.NOBLOCK)
    with pytest.raises(zmq.Again):
        near.send(b"x", zmq.NOBLOCK)
    readiness.want_room(near, room=True)
    assert readiness.poll(0.0) == {}
    far.recv()
    far.recv()
    assert readiness.poll(10.0) == {near: zmq.POLLOUT}
    readiness.want_room(near, room=False)
    assert readiness.poll(0.0) == {}


def test_a_wake_up_ends_the_wait(pair: tuple[Socket, Socket], wake: Wake) -> None:
    readiness = Readiness(wake)
    readiness.register(pair[0])
    found: list[object] = []
    waiting = threading.Thread(target=lambda: found.append(readiness.poll(60.0)))
    waiting.start()
    wake.set()
    waiting.join(30.0)
    assert found == [{}]


def test_who_is_gone_is_asked_no_more(pair: tuple[Socket, Socket], wake: Wake) -> None:
    near, far = pair
    readiness = Readiness(wake)
    readiness.register(near)
    far.send(b"too late")
    readiness.unregister(near)
    near.close(0)
    assert readiness.poll(0.0) == {}
