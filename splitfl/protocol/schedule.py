"""The key schedule: from the four handshake messages and three secrets to one traffic secret a direction (RFC 5869,
SHA-256).

    transcript = SHA-256( for each of Hello, Welcome, Open, Opened as sent: u64 length, big-endian || bytes )
    root       = HKDF-Extract(salt = transcript, ikm = client_secret || server_secret || kem_secret)
    secret[0]  = HKDF-Expand(root, "splitfl/1 client traffic" or "splitfl/1 server traffic", 32)
    key[e]     = HKDF-Expand(secret[e], "splitfl/1 key", 32)
    iv[e]      = HKDF-Expand(secret[e], "splitfl/1 iv", 12)
    secret[e+1] = HKDF-Expand(secret[e], "splitfl/1 next epoch", 32)

The secrets travel inside CURVE; the ML-KEM-768 secret (FIPS 203, an ephemeral key of the client) keeps what is recorded
today closed when X25519 falls.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from splitfl.errors import RemoteProtocolError
from splitfl.protocol.ciphers import IV_BYTES, KEY_BYTES
from splitfl.protocol.control import SECRET_BYTES

_PREFIX = b"splitfl/1 "


def transcript_hash(messages: Sequence[bytes]) -> bytes:
    """SHA-256 over the handshake messages as sent, each preceded by its length."""
    digest = hashlib.sha256()
    for message in messages:
        digest.update(len(message).to_bytes(8, "big"))
        digest.update(message)
    return digest.digest()


@dataclass(frozen=True, repr=False)
class TrafficSecrets:
    """The first secret of each direction."""

    client: bytes
    server: bytes


def traffic_secrets(handshake: Sequence[bytes], client_secret: bytes, server_secret: bytes, kem_secret: bytes) -> TrafficSecrets:
    """Both directions' first traffic secrets. ``handshake``: Hello, Welcome, Open, Opened, the bytes as sent."""
    ikm = client_secret + server_secret + kem_secret
    root = HKDF.extract(SHA256(), transcript_hash(handshake), ikm)
    return TrafficSecrets(_expand(root, b"client traffic", 32), _expand(root, b"server traffic", 32))


def key_and_iv(secret: bytes) -> tuple[bytes, bytes]:
    """The AEAD key and IV of one epoch."""
    return _expand(secret, b"key", KEY_BYTES), _expand(secret, b"iv", IV_BYTES)


def next_secret(secret: bytes) -> bytes:
    """The traffic secret of the next epoch; there is no way back."""
    return _expand(secret, b"next epoch", 32)


def _expand(secret: bytes, label: bytes, length: int) -> bytes:
    return HKDFExpand(SHA256(), length, _PREFIX + label).derive(secret)


def new_secret() -> bytes:
    """32 fresh random bytes."""
    return os.urandom(SECRET_BYTES)


class KemKey:
    """The client's ephemeral ML-KEM-768 key pair; lives for one handshake."""

    def __init__(self) -> None:
        self._key = MLKEM768PrivateKey.generate()
        self.public = self._key.public_key().public_bytes_raw()

    def decapsulate(self, ciphertext: bytes) -> bytes:
        """The shared secret, 32 bytes. A wrong ciphertext gives a wrong secret (implicit rejection), not an error."""
        return self._key.decapsulate(ciphertext)


def encapsulate(kem_public: bytes) -> tuple[bytes, bytes]:
    """The server's half: (shared secret of 32 bytes, ciphertext of 1088). Raises RemoteProtocolError for a key that is
    none.
    """
    try:
        return MLKEM768PublicKey.from_public_bytes(kem_public).encapsulate()
    except ValueError:
        raise RemoteProtocolError("Open.kem_public is not an ML-KEM-768 key") from None
