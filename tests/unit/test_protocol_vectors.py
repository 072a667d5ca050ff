"""A whole handshake as committed: key texts, encoded messages, ML-KEM, the keys that come of it, and the first records."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey

from splitfl.protocol import messages as m
from splitfl.protocol import schedule
from splitfl.protocol.assembly import Outbox
from splitfl.protocol.credit import CreditAccount
from splitfl.protocol.join import JoinString
from splitfl.protocol.keys import Identity, PublicKey
from splitfl.protocol.message import Message
from splitfl.protocol.records import DEFAULT_RECORD_BYTES, Opener, Sealer
from splitfl.protocol.session import ClientSession

VECTOR = json.loads((Path(__file__).parent.parent / "vectors" / "handshake.json").read_text())
FRAMES = {each["name"]: bytes.fromhex(each["frame"]) for each in VECTOR["messages"]}
KINDS: dict[str, type[Message]] = {"Hello": m.Hello, "Welcome": m.Welcome, "Open": m.Open, "Opened": m.Opened}


class SeededKem(schedule.KemKey):
    """The key pair of the vector's seed."""

    def __init__(self) -> None:
        self._key = MLKEM768PrivateKey.from_seed_bytes(bytes.fromhex(VECTOR["kem_seed"]))
        self.public = self._key.public_key().public_bytes_raw()


@pytest.mark.parametrize("who", ["client", "server"])
def test_keys_as_text(who: str) -> None:
    keys = VECTOR["keys"][who]
    identity = Identity.from_secret(bytes.fromhex(keys["secret"]))
    assert identity.public.raw.hex() == keys["public"]
    assert str(identity.public) == keys["public_text"]
    assert PublicKey.parse(keys["public_text"]) == identity.public
    assert identity.secret_text() == keys["secret_text"]


def test_the_join_string() -> None:
    join = JoinString.parse(VECTOR["join"])
    assert str(join) == VECTOR["join"]
    assert (join.host, join.port, join.run) == ("2001:db8::7", 7100, "trial")
    assert str(join.key) == VECTOR["keys"]["server"]["public_text"]


@pytest.mark.parametrize("vector", VECTOR["messages"], ids=lambda vector: vector["name"])
def test_messages_are_these_bytes(vector: dict[str, Any]) -> None:
    kind, frame = KINDS[vector["name"]], FRAMES[vector["name"]]
    message = m.decode_control(frame, from_client=kind in (m.Hello, m.Open))
    assert type(message) is kind
    stated = dict(vector["fields"])
    assert stated.pop("type") == kind.TYPE
    values = {each.name: getattr(message, each.name) for each in fields(message)}
    plain = {name: value.hex() if isinstance(value, bytes) else value for name, value in values.items()}
    assert json.loads(json.dumps(plain)) == stated
    assert m.encode(message) == frame


def test_a_client_that_draws_these_secrets_comes_to_these_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = m.decode_control(FRAMES["Open"], from_client=True)
    assert isinstance(asked, m.Open)
    monkeypatch.setattr(schedule, "KemKey", SeededKem)
    monkeypatch.setattr(schedule, "new_secret", lambda: asked.client_secret)
    session = ClientSession()
    assert session.send(m.decode_control(FRAMES["Hello"], from_client=True)) == FRAMES["Hello"]
    session.receive(FRAMES["Welcome"])
    wish = session.make_open(ciphers=asked.ciphers, model=asked.model, cut=asked.cut, name=asked.name)
    assert session.send(wish) == FRAMES["Open"]
    opened = session.receive(FRAMES["Opened"])
    assert isinstance(opened, m.Opened)
    assert SeededKem().decapsulate(opened.kem_ciphertext).hex() == VECTOR["kem_secret"]
    assert schedule.transcript_hash(list(FRAMES.values())).hex() == VECTOR["transcript_hash"]
    assert session.secrets is not None
    for who, secret, message in (
        ("client", session.secrets.client, m.Attach()),
        ("server", session.secrets.server, m.Attached()),
    ):
        key, iv = schedule.key_and_iv(secret)
        assert (secret.hex(), key.hex(), iv.hex()) == tuple(VECTOR[who][name] for name in ("secret", "key", "iv"))
        outbox = Outbox(Sealer(secret, opened.cipher), DEFAULT_RECORD_BYTES, CreditAccount(opened.window))
        outbox.add(message, b"")
        frame = outbox.next_frame()
        assert frame is not None
        assert bytes(frame).hex() == VECTOR[who]["first_record"]
        opener = Opener(secret, opened.cipher)
        plain = bytearray(len(frame) - 48)
        opener.open_into(opener.header(frame), frame, plain)
        assert m.decode_data(bytes(plain), from_client=who == "client") == message
