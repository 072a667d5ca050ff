"""The channel between real processes: one that dies, one that forgets to close."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from splitfl.protocol.join import JoinString
from splitfl.protocol.keys import Identity, PublicKey
from tests.unit.channel_world import World, inverted, wait_until

SERVER = """
import sys, time
from tests.unit.channel_world import World, Handler
world = World("zmq")
world.allow(type(world.identity.public).parse(sys.argv[1]), "a")
print(world.join_string, flush=True)
sys.stdin.read()
world.server.stop("done")
"""

FORGETFUL = """
import sys
from splitfl.protocol.join import JoinString
from splitfl.protocol.keys import Identity
from tests.unit.channel_world import World
world = World.__new__(World)
world.kind, world.clients, world.identity = "zmq", [], Identity.from_secret(bytes.fromhex(sys.argv[2]))
client = world.join(join=JoinString.parse(sys.argv[1]))
print(client.echo(b"hi there").hex(), flush=True)
if sys.argv[3:] == ["raise"]:
    raise SystemExit(7)
"""


def spawn(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def world() -> Iterator[World]:
    world = World("zmq")
    yield world
    world.close()


def test_a_server_that_is_killed_is_noticed_at_once() -> None:
    identity = Identity.generate()
    server = spawn(SERVER, str(identity.public))
    try:
        assert server.stdout is not None
        join = JoinString.parse(server.stdout.readline())
        local = World.__new__(World)
        local.kind, local.clients, local.identity = "zmq", [], identity
        client = local.join(join=join)
        assert client.echo(b"two processes!") == inverted(b"two processes!")
        server.kill()
        wait_until(lambda: client.lost, 3)
        assert "broke" in str(client.lost[0])
        client.channel.close()
    finally:
        server.kill()
        server.communicate()


def test_a_server_that_stops_says_so() -> None:
    identity = Identity.generate()
    server = spawn(SERVER, str(identity.public))
    try:
        assert server.stdout is not None
        local = World.__new__(World)
        local.kind, local.clients, local.identity = "zmq", [], identity
        client = local.join(join=JoinString.parse(server.stdout.readline()))
        server.communicate(timeout=20)
        assert server.returncode == 0
        wait_until(lambda: client.lost, 3)
        assert "done" in str(client.lost[0])
    finally:
        server.kill()


@pytest.mark.parametrize("end", ["fall off", "raise"])
def test_a_client_that_forgets_to_close_still_exits(world: World, end: str) -> None:
    identity = Identity.generate()
    world.allow(PublicKey(identity.public.raw), "forgetful")
    client = spawn(FORGETFUL, str(world.join_string), identity.secret.hex(), end)
    output, _ = client.communicate(timeout=30)
    assert bytes.fromhex(output.strip()) == inverted(b"hi there")
    assert client.returncode == (7 if end == "raise" else 0)
    wait_until(lambda: world.handler.closed, 5)
