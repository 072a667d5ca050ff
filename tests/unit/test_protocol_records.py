"""Key schedule, ciphers and records: the committed vectors, RFC 5869, and every way in which a record can be wrong."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfl.errors import LocalProtocolError, SealError
from splitfl.protocol import schedule
from splitfl.protocol.ciphers import AES_256_GCM, CHACHA20_POLY1305, CIPHERS, choose_cipher, make_aead, pick_ciphers
from splitfl.protocol.records import HEADER_BYTES, LAST, OVERHEAD_BYTES, PAYLOAD, Opener, RekeyLimits, Sealer

VECTORS = Path(__file__).parent.parent / "vectors"
SECRET = bytes(range(32))


def vectors(name: str) -> Any:
    return json.loads((VECTORS / name).read_text())


def test_hkdf_is_that_of_rfc_5869() -> None:
    """Test case 1 of appendix A.1."""
    ikm, salt, info = bytes.fromhex("0b" * 22), bytes(range(13)), bytes(range(0xF0, 0xFA))
    prk = HKDF.extract(SHA256(), salt, ikm)
    assert prk.hex() == "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5"
    okm = HKDFExpand(SHA256(), 42, info).derive(prk)
    assert okm.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"


def test_key_schedule_vectors() -> None:
    vector = vectors("key_schedule.json")
    handshake = [bytes.fromhex(message) for message in vector["handshake"]]
    assert schedule.transcript_hash(handshake).hex() == vector["transcript_hash"]
    secrets = schedule.traffic_secrets(
        handshake, *(bytes.fromhex(vector[name]) for name in ("client_secret", "server_secret", "kem_secret"))
    )
    for direction, secret in (("client", secrets.client), ("server", secrets.server)):
        for epoch in vector[direction]:
            assert secret.hex() == epoch["secret"]
            key, iv = schedule.key_and_iv(secret)
            assert (key.hex(), iv.hex()) == (epoch["key"], epoch["iv"])
            secret = schedule.next_secret(secret)


@pytest.mark.parametrize("cipher", sorted(CIPHERS))
def test_record_vectors(cipher: str) -> None:
    vector = vectors("records.json")
    sealer = Sealer(bytes.fromhex(vector["secret"]), cipher, limits=RekeyLimits(records=vector["rekey_after_records"]))
    opener = Opener(bytes.fromhex(vector["secret"]), cipher)
    for record in vector[cipher]:
        plaintext = bytes.fromhex(record["plaintext"])
        frame = sealer.seal(record["kind"], record["flags"], record["message"], record["total"], plaintext)
        assert frame.hex() == record["frame"]
        header = opener.header(frame)
        assert (header.epoch, header.sequence) == (record["epoch"], record["sequence"])
        opened = bytearray(len(plaintext))
        opener.open_into(header, frame, opened)
        assert opened == plaintext


def test_every_input_of_the_schedule_matters() -> None:
    handshake = [b"hello", b"welcome", b"open", b"opened"]
    seen = {schedule.traffic_secrets(handshake, bytes(32), bytes(32), bytes(32)).client}
    for index in range(4):
        changed = list(handshake)
        changed[index] += b"!"
        seen.add(schedule.traffic_secrets(changed, bytes(32), bytes(32), bytes(32)).client)
    # The lengths are hashed: moving a byte from one message to the next is another transcript.
    seen.add(schedule.traffic_secrets([b"hell", b"owelcome", b"open", b"opened"], bytes(32), bytes(32), bytes(32)).client)
    for index in range(3):
        secrets = [bytes(32)] * 3
        secrets[index] = bytes(31) + b"\1"
        seen.add(schedule.traffic_secrets(handshake, *secrets).client)
    assert len(seen) == 9


def test_kem_round_trip() -> None:
    key = schedule.KemKey()
    secret, ciphertext = schedule.encapsulate(key.public)
    assert key.decapsulate(ciphertext) == secret
    assert key.decapsulate(bytes([ciphertext[0] ^ 1]) + ciphertext[1:]) != secret


def opens(opener: Opener, frame: Any) -> bytes:
    destination = bytearray(max(0, len(frame) - OVERHEAD_BYTES))
    opener.open_into(opener.header(frame), frame, destination)
    return bytes(destination)


@pytest.mark.parametrize("cipher", sorted(CIPHERS))
def test_any_flipped_bit_ends_the_session(cipher: str) -> None:
    frame = Sealer(SECRET, cipher).seal(PAYLOAD, LAST, 3, 5, b"hello")
    for position, bit in product(range(len(frame)), (0, 7)):
        opener = Opener(SECRET, cipher)
        damaged = bytearray(frame)
        damaged[position] ^= 1 << bit
        with pytest.raises(SealError):
            opens(opener, damaged)
        with pytest.raises(SealError, match="did not verify"):
            opens(opener, frame)


@pytest.mark.parametrize("cut", [0, 1, HEADER_BYTES, OVERHEAD_BYTES - 1, OVERHEAD_BYTES, OVERHEAD_BYTES + 4])
def test_a_cut_record(cut: int) -> None:
    frame = Sealer(SECRET, AES_256_GCM).seal(PAYLOAD, LAST, 3, 5, b"hello")
    with pytest.raises(SealError):
        opens(Opener(SECRET, AES_256_GCM), frame[:cut])


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_no_record(frame: bytes) -> None:
    with pytest.raises(SealError):
        opens(Opener(SECRET, AES_256_GCM), frame)


def test_only_the_expected_sequence() -> None:
    sealer = Sealer(SECRET, AES_256_GCM)
    frames = [sealer.seal(PAYLOAD, 0, 0, 9, bytes([number])) for number in range(3)]
    for order in ((0, 0), (1,), (0, 2), (0, 1, 0)):
        opener = Opener(SECRET, AES_256_GCM)
        for number in order[:-1]:
            opens(opener, frames[number])
        with pytest.raises(SealError, match="was expected"):
            opens(opener, frames[order[-1]])


def test_the_other_direction_does_not_open() -> None:
    secrets = schedule.traffic_secrets([b"", b"", b"", b""], bytes(32), bytes(32), bytes(32))
    frame = Sealer(secrets.client, AES_256_GCM).seal(PAYLOAD, LAST, 0, 2, b"hi")
    with pytest.raises(SealError, match="does not verify"):
        opens(Opener(secrets.server, AES_256_GCM), frame)


@pytest.mark.parametrize(
    ("limits", "epochs"),
    [
        (RekeyLimits(records=2), [0, 0, 1, 1, 2, 2]),
        (RekeyLimits(bytes=25), [0, 0, 1, 1, 2, 2]),
        (RekeyLimits(seconds=35.0), [0, 0, 0, 0, 1, 1]),
    ],
)
def test_keys_change_by_records_bytes_and_time(limits: RekeyLimits, epochs: list[int]) -> None:
    now = [0.0]
    sealer, opener = Sealer(SECRET, AES_256_GCM, limits=limits, clock=lambda: now[0]), Opener(SECRET, AES_256_GCM)
    seen = []
    for number in range(6):
        frame = sealer.seal(PAYLOAD, 0, 0, 60, bytes([number] * 10))
        seen.append(opener.header(frame).epoch)
        assert opens(opener, frame) == bytes([number] * 10)
        now[0] += 10
    assert seen == epochs


def test_an_epoch_cannot_be_skipped() -> None:
    sealer = Sealer(SECRET, AES_256_GCM, limits=RekeyLimits(records=1))
    frames = [sealer.seal(PAYLOAD, 0, 0, 9, b"x") for _ in range(3)]
    ahead = bytearray(frames[2])
    ahead[8:16] = bytes(8)
    with pytest.raises(SealError, match="epoch 2 in epoch 0"):
        opens(Opener(SECRET, AES_256_GCM), ahead)


def test_the_ciphers_on_offer() -> None:
    assert set(pick_ciphers()) == {AES_256_GCM, CHACHA20_POLY1305}
    ticks = iter([0.0, 9.0] * 3 + [0.0, 1.0] * 3)
    assert pick_ciphers(lambda: next(ticks))[0] == CHACHA20_POLY1305
    ticks = iter([0.0, 1.0] * 6)
    assert pick_ciphers(lambda: next(ticks))[0] == AES_256_GCM
    assert choose_cipher(("x", CHACHA20_POLY1305, AES_256_GCM), (AES_256_GCM, CHACHA20_POLY1305)) == CHACHA20_POLY1305
    assert choose_cipher(("x",), (AES_256_GCM,)) is None
    with pytest.raises(LocalProtocolError, match="no cipher 'rot13'"):
        make_aead("rot13", bytes(32))


@pytest.mark.parametrize("client_has_aes", [True, False])
@pytest.mark.parametrize("server_has_aes", [True, False])
def test_the_cipher_is_the_one_that_slows_neither_side_down_much(client_has_aes: bool, server_has_aes: bool) -> None:
    def machine(has_aes: bool) -> tuple[str, ...]:
        # Seconds a pass: AES 1 in hardware and 12 without, ChaCha20 3.
        ticks = iter([0.0, 1.0 if has_aes else 12.0] * 3 + [0.0, 3.0] * 3)
        return pick_ciphers(lambda: next(ticks))

    chosen = choose_cipher(machine(client_has_aes), machine(server_has_aes))
    assert chosen == (AES_256_GCM if client_has_aes and server_has_aes else CHACHA20_POLY1305)
