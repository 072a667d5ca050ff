"""No key seals two records under one nonce: over epochs, directions, sessions and reconnections."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from splitfl.protocol import records
from splitfl.protocol.ciphers import make_aead
from tests.unit.channel_world import MIB, Make, inverted, make_worlds


@pytest.fixture
def make() -> Iterator[Make]:
    yield from make_worlds("memory")


class Recording:
    """The cipher, and under which key and nonce it has sealed."""

    used: list[tuple[bytes, bytes]]

    def __init__(self, name: str, key: bytes) -> None:
        self._aead, self._key = make_aead(name, key), key

    def encrypt_into(self, nonce: Any, *rest: Any) -> int:
        self.used.append((self._key, bytes(nonce)))
        return self._aead.encrypt_into(nonce, *rest)

    def decrypt_into(self, *arguments: Any) -> int:
        return self._aead.decrypt_into(*arguments)


def test_nonces_never_repeat_across_rekeys_and_reconnections(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    often = records.RekeyLimits(records=3)
    monkeypatch.setattr(records, "RekeyLimits", lambda: often)
    used: list[tuple[bytes, bytes]] = []
    factory = type("Recorded", (Recording,), {"used": used})
    world = make(aead_factory=factory)
    lost = ""
    for session in range(4):
        client = world.join(aead_factory=factory)
        for micro in range(4):
            payload = os.urandom(3 * MIB + 2)
            assert client.echo(payload, micro) == inverted(payload)
        if session % 2:
            client.channel.close()
        else:  # a link that breaks: what comes next is a new session all the same
            world.network.server.detach(client.channel._transport._link)  # type: ignore[union-attr]
        assert client.channel.opened.session != lost
        lost = client.channel.opened.session
    assert len(used) >= 4 * 2 * (1 + 4 * 5)
    assert len(set(used)) == len(used)
    keys = {key for key, _ in used}
    assert len(keys) >= 4 * 2 * 6, "each epoch of each direction of each session has a key of its own"
