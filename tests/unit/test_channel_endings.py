"""The contract of every transport, continued: how sessions end, tickets, hostile bytes on an open session."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from client_ends.retrying import may_pass
from splitfl.channel.server import ServerChannel
from splitfl.channel.timing import Timing
from splitfl.errors import (
    ConfigError,
    Refused,
    SessionLost,
)
from splitfl.protocol import messages
from splitfl.protocol.ciphers import AES_256_GCM
from splitfl.protocol.keys import Identity
from splitfl.protocol.messages import (
    PROTOCOL_VERSION,
    Enrol,
    Fault,
    Heartbeat,
    Hello,
    Leave,
    encode,
)
from splitfl.protocol.session import ClientSession
from tests.unit.channel_world import (
    MIB,
    MODEL,
    QUICK,
    Client,
    Make,
    World,
    forward,
    inverted,
    make_worlds,
    wait_until,
)


@pytest.fixture(params=["memory", "zmq"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes worlds over one transport."""
    yield from make_worlds(request.param)


# --- Endings ---


def test_close_sends_what_is_queued_and_leaves(make: Make) -> None:
    world = make(window=64 * MIB, max_message=8 * MIB)
    world.handler.echo = False
    client = world.join()
    payloads = [os.urandom(3 * MIB + 2) for _ in range(12)]
    for micro, payload in enumerate(payloads):
        client.channel.send(forward(len(payload), micro), payload)
    client.channel.close()
    wait_until(lambda: world.handler.closed)
    assert [bytes(payload) for _, _, payload in world.handler.data] == payloads
    assert [message for _, message in world.handler.control] == [Leave()]
    assert world.handler.closed == [(client.channel.opened.session, "the client said goodbye")]
    assert not client.lost
    for late in (lambda: client.channel.tell(Enrol()), lambda: client.channel.send(forward(2), b"ab")):
        with pytest.raises(SessionLost, match="closed"):
            late()
    client.channel.close()


def test_close_right_after_the_last_word_waits_for_nothing(make: Make) -> None:
    patient = Timing(heartbeat=300.0, silence=600.0, flush=300.0)
    client = make(timing=patient).join(timing=patient)
    wait_until(lambda: client.channel._tally.heard == 3)  # Welcome, Opened, and the first heartbeat, which would wake it
    transport: Any = client.channel._transport
    poll, wake, woken = transport.poll, transport.wake, []
    between, both_asked = threading.Event(), threading.Event()

    def held(timeout: float) -> Any:
        between.set()
        both_asked.wait()
        return poll(timeout)

    transport.poll = held
    wake()
    between.wait()
    transport.wake = lambda: (wake(), woken.append(1))
    client.channel.tell(Enrol())
    closing = threading.Thread(target=client.channel.close, daemon=True)
    closing.start()
    wait_until(lambda: len(woken) == 2)
    both_asked.set()
    closing.join(10)
    assert not closing.is_alive()


def test_credit_that_comes_after_goodbye_harms_nothing(make: Make) -> None:
    world = make(window=64 * MIB)
    client = world.join()
    for micro in range(8):
        client.channel.send(forward(6 * MIB, micro), bytes(6 * MIB))
    client.channel.close()
    wait_until(lambda: world.handler.closed)
    assert world.handler.closed[0][1] == "the client said goodbye"
    assert len(world.handler.data) == 8


def test_close_without_leaving(make: Make) -> None:
    world = make()
    client = world.join()
    client.channel.close(leave=False)
    wait_until(lambda: world.handler.closed)
    assert world.handler.control == []


def test_the_server_stops_in_good_order(make: Make) -> None:
    world = make()
    client = world.join()
    world.server.stop("maintenance")
    wait_until(lambda: client.lost)
    assert "maintenance" in str(client.lost[0])
    assert getattr(client.lost[0], "code", "") == "closing"
    assert world.handler.closed == [(client.channel.opened.session, "maintenance")]
    with pytest.raises(SessionLost, match="maintenance"):
        client.channel.tell(Enrol())


def test_a_connection_in_memory_that_breaks_is_noticed_at_once() -> None:
    with contextlib.closing(World("memory")) as world:
        client = world.join(timing=Timing(heartbeat=300.0, silence=600.0))
        world.transport.detach(client.channel._transport._link)  # type: ignore[attr-defined]
        wait_until(lambda: client.lost)


def test_a_server_that_fails_by_itself_is_waited_for(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make()
    client = world.join()

    def fail() -> None:
        raise RuntimeError("a mistake in the I/O thread")

    monkeypatch.setattr(world.server._sessions, "tick", fail)
    wait_until(lambda: client.lost)
    assert getattr(client.lost[0], "code", "") == "restarting"
    assert may_pass(client.lost[0]), "the client connects again"
    assert "the server has failed" in str(client.lost[0])
    assert isinstance(world.server.failure, RuntimeError)


def test_end_tells_the_client_why(make: Make) -> None:
    world = make()
    client = world.join()
    world.server.end(client.channel.opened.session, Fault("stale", "the step went on without you"))
    wait_until(lambda: client.lost)
    assert getattr(client.lost[0], "code", "") == "stale"
    assert "went on without you" in str(client.lost[0])
    wait_until(lambda: world.handler.closed)
    world.server.send(client.channel.opened.session, messages.Hidden(0, 0, 4, 1, "float16", "raw"), bytes(8))
    world.server.credit(client.channel.opened.session, 8)


def silence(world: World, client: Client) -> None:
    """The client's thread lives on and says nothing: its machine sleeps."""
    transport: Any = client.channel._transport
    transport.send_control = lambda frame: None
    transport.send_data = lambda frame: True


def test_a_client_that_falls_silent_is_noticed(make: Make) -> None:
    world = make()
    client = world.join()
    silence(world, client)
    wait_until(lambda: world.handler.closed, 5)
    assert "silent for 1 s" in world.handler.closed[0][1]


def test_a_server_that_falls_silent_is_noticed(make: Make) -> None:
    world = make()
    client = world.join()
    poll = client.channel._transport.poll
    client.channel._transport.poll = lambda timeout: poll(timeout)[:0]  # type: ignore[method-assign]
    wait_until(lambda: client.lost, 5)
    assert "silent for 1 s" in str(client.lost[0])


def test_heartbeats_keep_an_idle_session(make: Make) -> None:
    world = make()
    client = world.join()
    threading.Event().wait(2.2 * QUICK.silence)
    assert not client.lost
    assert not world.handler.closed
    assert client.echo(b"ab") == inverted(b"ab")


def test_a_second_session_after_a_loss_has_fresh_keys(make: Make) -> None:
    world = make()
    first = world.join()
    kept = world.handler.opened[0].open
    world.server.end(first.channel.opened.session, Fault("internal", "lost"))
    wait_until(lambda: first.lost)
    second = world.join()
    assert second.echo(b"again!") == inverted(b"again!")
    fresh = world.handler.opened[1].open
    assert kept.client_secret != fresh.client_secret
    assert kept.kem_public != fresh.kem_public
    one, two = first.channel.opened, second.channel.opened
    assert one.session != two.session
    assert one.ticket != two.ticket
    assert one.server_secret != two.server_secret
    keys = [client.channel._session.secrets for client in (first, second)]
    assert len({secret for pair in keys if pair for secret in (pair.client, pair.server)}) == 4


def test_a_key_removed_from_the_list_loses_its_session(make: Make) -> None:
    world = make()
    client = world.join()
    world.authorized._clients.clear()
    world.authorized.generation += 1
    wait_until(lambda: client.lost)
    assert getattr(client.lost[0], "code", "") == "not-authorized"
    with pytest.raises(Refused):
        world.join()


def test_many_sessions_at_once(make: Make) -> None:
    world = make()
    identities = [Identity.generate() for _ in range(12)]
    for number, identity in enumerate(identities):
        world.allow(identity.public, f"client-{number}")
    failures: list[BaseException] = []

    def work(identity: Identity) -> None:
        try:
            client = world.join(identity=identity)
            for micro in range(4):
                payload = os.urandom(600_002)
                assert client.echo(payload, micro) == inverted(payload)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(identity,)) for identity in identities]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len({session.session for session in world.handler.opened}) == 12
    assert {session.peer.name for session in world.handler.opened} == {f"client-{number}" for number in range(12)}


# --- Tickets ---


def opened_by_hand(world: World) -> tuple[Any, Any]:
    """A session up to Opened, spoken by hand: (the transport, Opened)."""
    transport, session = world.client_transport(), ClientSession()
    join = world.join_string
    transport.connect_control(join.host, join.port, join.key, world.identity, 3.0)
    transport.send_control(session.send(Hello(PROTOCOL_VERSION, "run", {}, "")))
    while True:
        for frame in transport.poll(0.1):
            message = session.receive(bytes(frame.frame))
            if isinstance(message, messages.Welcome):
                asked = session.make_open(ciphers=(AES_256_GCM,), model=MODEL, cut=(1, 1), name="a")
                transport.send_control(session.send(asked))
            elif isinstance(message, messages.Opened):
                transport.set_frame_limit(2 * MIB)
                return transport, message


def data_port(world: World) -> int:
    return int(world.transport.data_port)


def test_a_ticket_works_once(make: Make) -> None:
    world = make()
    transport, opened = opened_by_hand(world)
    transport.connect_data("127.0.0.1", data_port(world), opened.ticket, 3.0)
    thief, _ = opened_by_hand(world)
    with pytest.raises(Refused, match="refused the session's ticket"):
        thief.connect_data("127.0.0.1", data_port(world), opened.ticket, 3.0)
    wait_until(lambda: world.handler.refused)
    assert "data connection" in world.handler.refused[0][0]
    transport.close(0)
    thief.close(0)


def test_a_ticket_expires(make: Make) -> None:
    now = [1000.0]
    world = make(clock=lambda: now[0])
    transport, opened = opened_by_hand(world)
    now[0] += opened.ticket_seconds
    with pytest.raises(Refused, match="used or too old"):
        transport.connect_data("127.0.0.1", data_port(world), opened.ticket, 3.0)
    transport.close(0)


def test_a_made_up_ticket_is_refused(make: Make) -> None:
    world = make()
    transport, _ = opened_by_hand(world)
    with pytest.raises(Refused):
        transport.connect_data("127.0.0.1", data_port(world), os.urandom(32), 3.0)
    transport.close(0)


def test_a_ticket_without_the_keys_opens_nothing(make: Make) -> None:
    world = make()
    transport, opened = opened_by_hand(world)
    transport.connect_data("127.0.0.1", data_port(world), opened.ticket, 3.0)
    transport.send_data(bytes(100))
    wait_until(lambda: world.handler.refused)
    assert "seal" in world.handler.refused[0][2]
    assert not world.handler.opened
    transport.close(0)


# --- Hostile bytes on an open session ---


@pytest.mark.parametrize(
    "junk", [b"", b"\xc1", b"\x81\xa4type\x03", b"\x81\xa4type\x05", os.urandom(300), encode(Heartbeat(1.0))[:-1]]
)
def test_junk_on_control_ends_that_session_only(make: Make, junk: bytes) -> None:
    world = make()
    well, ill = world.join(), world.join()
    ill.channel._control_queue.append(junk or b"\x00")
    ill.channel._transport.wake()
    if junk == b"\x81\xa4type\x05":  # a perfectly good Pause
        wait_until(lambda: world.handler.control)
        return
    wait_until(lambda: ill.lost and world.handler.closed)
    assert getattr(ill.lost[0], "code", "") == "protocol"
    assert "broke the protocol" in world.handler.closed[0][1]
    assert well.echo(b"ab") == inverted(b"ab")


@pytest.mark.parametrize("junk", [b"x", bytes(32), bytes(48), os.urandom(1000)])
def test_junk_on_data_ends_that_session_only(make: Make, junk: bytes) -> None:
    world = make()
    well, ill = world.join(), world.join()
    ill.channel._path.stuck = bytearray(junk)
    ill.channel._transport.wake()
    wait_until(lambda: ill.lost and world.handler.closed)
    assert getattr(ill.lost[0], "code", "") == "seal"
    assert "seal" in world.handler.closed[0][1]
    assert well.echo(b"ab") == inverted(b"ab")


def test_what_an_ended_session_still_sends_is_passed_over(make: Make) -> None:
    world = make()
    client = world.join()
    transport = client.channel._transport
    client.channel._session.receive = lambda frame: None  # type: ignore[method-assign, assignment, return-value]
    world.server.end(client.channel.opened.session, Fault("stale", "too late"))
    wait_until(lambda: world.handler.closed)
    for _ in range(20):
        client.channel._control_queue.append(encode(Heartbeat(0.0)))
        client.channel._data_queue.append((forward(8), memoryview(bytes(8))))
        transport.wake()
    assert world.join().echo(b"ab") == inverted(b"ab")
    assert len(world.handler.closed) == 1
    assert world.handler.refused == []
    assert world.handler.control == []


def test_a_frame_over_the_limit_cuts_the_connection(make: Make) -> None:
    world = make()
    well, ill = world.join(), world.join()
    ill.channel._control_queue.append(bytes(65 * 1024))
    ill.channel._transport.wake()
    wait_until(lambda: ill.lost and world.handler.closed)
    assert "broke" in str(ill.lost[0])
    assert well.echo(b"ab") == inverted(b"ab")


def test_settings_that_cannot_work_are_refused(make: Make) -> None:
    world = make()
    for wrong in ({"window": 1, "max_message": 2}, {"record": 1024}):
        with pytest.raises(ConfigError):
            ServerChannel(world.transport, world.handler, authorized=world.authorized, **wrong)  # type: ignore[arg-type]
