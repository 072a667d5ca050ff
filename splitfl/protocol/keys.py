"""Keys: Curve25519 pairs, shown as ``splitfl-pub-`` or ``splitfl-sec-`` and 56 characters of lower-case base32.

The text holds the 32 raw bytes and a checksum of 3, so that a typo is told from a stranger. Pairs are CURVE's (X25519,
RFC 7748).
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from splitfl.errors import KeyFileError
from splitfl.protocol.limits import Limit, parse_limit

_log = logging.getLogger(__name__)

KEY_BYTES = 32
_CHECKSUM_BYTES = 3
_TEXT_LENGTH = 56  # base32 of 35 bytes: no padding
PUBLIC_PREFIX = "splitfl-pub-"
SECRET_PREFIX = "splitfl-sec-"


def _to_text(prefix: str, raw: bytes) -> str:
    checksum = hashlib.sha256(prefix.encode() + raw).digest()[:_CHECKSUM_BYTES]
    return prefix + base64.b32encode(raw + checksum).decode().lower()


def _from_text(prefix: str, text: str) -> bytes:
    other = SECRET_PREFIX if prefix == PUBLIC_PREFIX else PUBLIC_PREFIX
    if text.startswith(other):
        wanted = "public" if prefix == PUBLIC_PREFIX else "secret"
        raise KeyFileError(f"a {wanted} key ({prefix}...) is wanted here, not one that begins with {other}")
    if not text.startswith(prefix):
        raise KeyFileError(f"a key begins with {prefix}")
    body = text[len(prefix) :]
    if len(body) != _TEXT_LENGTH:
        raise KeyFileError(f"a key has {_TEXT_LENGTH} characters after {prefix}, this one {len(body)}")
    try:
        if body != body.lower():
            raise ValueError
        decoded = base64.b32decode(body.upper())
    except ValueError:
        raise KeyFileError("a key has only the letters a to z and the digits 2 to 7 after its prefix") from None
    raw = decoded[:KEY_BYTES]
    if _to_text(prefix, raw) != text:
        raise KeyFileError("a key with a typo: its checksum does not fit, copy it again")
    return raw


@dataclass(frozen=True)
class PublicKey:
    """A public key; ``str()`` gives the text that users pass around."""

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != KEY_BYTES:
            raise KeyFileError(f"a public key has {KEY_BYTES} bytes, not {len(self.raw)}")

    def __str__(self) -> str:
        return _to_text(PUBLIC_PREFIX, self.raw)

    def __repr__(self) -> str:
        return f"PublicKey({self})"

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """Reads the text form. Raises KeyFileError with one sentence."""
        return cls(_from_text(PUBLIC_PREFIX, text.strip()))


@dataclass(frozen=True)
class Identity:
    """A key pair: who a client or a server is. The secret never shows in ``repr``."""

    secret: bytes = field(repr=False)
    public: PublicKey

    @classmethod
    def generate(cls) -> Identity:
        """A fresh pair from the system's random source."""
        return cls.from_secret(X25519PrivateKey.generate().private_bytes_raw())

    @classmethod
    def from_secret(cls, secret: bytes) -> Identity:
        """The pair of a 32-byte secret."""
        if len(secret) != KEY_BYTES:
            raise KeyFileError(f"a secret key has {KEY_BYTES} bytes, not {len(secret)}")
        return cls(secret, PublicKey(X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()))

    def secret_text(self) -> str:
        """The text form of the secret: for the key file, never for a log."""
        return _to_text(SECRET_PREFIX, self.secret)


def public_path(path: str | os.PathLike[str]) -> Path:
    """Where the public half of a key file lies: beside it, ``.pub``."""
    return Path(f"{os.fspath(path)}.pub")


def write_identity(path: str | os.PathLike[str], identity: Identity | None = None) -> Identity:
    """Writes a new key file (mode 0600) and its ``.pub`` beside it; neither may exist. Raises KeyFileError."""
    identity = identity or Identity.generate()
    path = Path(path)
    for target in (path, public_path(path)):
        if target.exists():
            raise KeyFileError(f"{target} exists: a key is never overwritten, choose another name or move it away")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = f"# The secret of {identity.public}: who holds this file is this party.\n{identity.secret_text()}\n"
        _write_exclusively(path, lines, 0o600)
        _write_exclusively(public_path(path), f"{identity.public}\n", 0o644)
    except OSError as error:
        raise KeyFileError(f"the key cannot be written to {path}: {error.strerror}") from None
    return identity


def _write_exclusively(path: Path, text: str, mode: int) -> None:
    # O_EXCL: of two writers one fails, and a symbolic link laid in the way is not followed.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w", encoding="ascii", newline="\n") as file:
        file.write(text)


def read_identity(path: str | os.PathLike[str]) -> Identity:
    """Reads a key file. Raises KeyFileError: missing, malformed, or (POSIX) open to other users."""
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            # Windows has no mode bits worth the name: there the directory's access list protects the file.
            if os.name == "posix" and stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise KeyFileError(f"{path} can be read by other users: run chmod 600 on it")
            text = file.read(4096)
    except FileNotFoundError:
        raise KeyFileError(f"there is no key file {path}: make one with splitfl keygen") from None
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"the key file {path} cannot be read: {error}") from None
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if len(lines) != 1:
        raise KeyFileError(f"{path} must hold one {SECRET_PREFIX} line, it has {len(lines)} lines")
    try:
        return Identity.from_secret(_from_text(SECRET_PREFIX, lines[0]))
    except KeyFileError as error:
        raise KeyFileError(f"{path}: {error}") from None


# --- Who may join: the authorized_clients file ---

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")


@dataclass(frozen=True)
class AuthorizedClient:
    """One line of the file. ``limits`` are the operator's, see :data:`splitfl.protocol.limits.LIMITS`."""

    name: str
    limits: Mapping[str, Limit] = field(default_factory=dict)


def parse_line(line: str) -> tuple[PublicKey, AuthorizedClient] | None:
    """One line; None where it is empty or a comment. Raises KeyFileError with one sentence."""
    words = line.partition("#")[0].split()
    if not words:
        return None
    key = PublicKey.parse(words[0])
    if len(words) < 2:
        raise KeyFileError("a name must follow the key")
    name = words[1]
    # Names become those of directories, where . and .. are taken.
    if not _NAME.match(name) or not name.strip("."):
        raise KeyFileError(f"the name {name[:64]!r} must have 1 to 64 letters, digits, dots, dashes or underscores")
    limits: dict[str, Limit] = {}
    for word in words[2:]:
        limit, equals, value = word.partition("=")
        if not equals or not limit or not value:
            raise KeyFileError(f"{word[:64]!r} is not a limit: write key=value")
        if limit in limits:
            raise KeyFileError(f"the limit {limit} is given twice")
        limits[limit] = parse_limit(limit, value)
    return key, AuthorizedClient(name, limits)


class AuthorizedClients:
    """The ``authorized_clients`` file, re-read when it changes: one client a line, with its public key, its name, and
    limits as ``key=value``; ``#`` begins a comment.

        splitfl-pub-...  hospital-a  tokens_per_second=20000 sessions=2  # agreed on 2 May

    At the start a malformed line is a KeyFileError. Later it is logged and passed over, the other lines hold: an edit
    never stops a running server, and never lets anybody in who is not on a good line. A file that has vanished admits
    nobody.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._stamp: tuple[int, int, int] | None = None
        self.generation = 0  # how often the file has been read again
        self._clients: dict[bytes, AuthorizedClient] = {}
        stamp = self._look()
        if stamp is None:
            raise KeyFileError(f"there is no file {self.path}: make it, with one line (key and name) for each client")
        self._read(strict=True)
        self._stamp = stamp

    @classmethod
    def of(cls, clients: Mapping[PublicKey, AuthorizedClient]) -> AuthorizedClients:
        """A fixed list without a file (tests, the demo)."""
        fixed = cls.__new__(cls)
        fixed.path, fixed._stamp, fixed.generation = Path(), None, 0
        fixed._clients = {key.raw: client for key, client in clients.items()}
        return fixed

    def lookup(self, public_key: PublicKey) -> AuthorizedClient | None:
        """The client with this key, or None; sees the file as it is now."""
        self.refresh()
        return self.known(public_key)

    def known(self, public_key: PublicKey) -> AuthorizedClient | None:
        """As ``lookup``, of the file as it was read last."""
        return self._clients.get(public_key.raw)

    def refresh(self) -> bool:
        """Re-reads the file if its time or size changed; True if it did."""
        if self.path == Path():
            return False
        stamp = self._look()
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        self.generation += 1
        if stamp is None:
            _log.error("%s is gone: no client is admitted until it is back", self.path)
            self._clients = {}
        else:
            self._read(strict=False)
        return True

    def __len__(self) -> int:
        return len(self._clients)

    def _look(self) -> tuple[int, int, int] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        # The inode too: an editor that replaces the file within one tick of the clock may keep its size.
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self, *, strict: bool) -> None:
        clients: dict[bytes, AuthorizedClient] = {}
        names: set[str] = set()
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            if strict:
                raise KeyFileError(f"{self.path} cannot be read: {error}") from None
            _log.error("%s cannot be read, no client is admitted: %s", self.path, error)
            lines = []
        for number, line in enumerate(lines, 1):
            try:
                parsed = parse_line(line)
                if parsed is None:
                    continue
                key, client = parsed
                if key.raw in clients or client.name in names:
                    raise KeyFileError(f"the key or the name {client.name} stands on an earlier line")
            except KeyFileError as error:
                if strict:
                    raise KeyFileError(f"{self.path}, line {number}: {error}") from None
                _log.error("%s, line %d, passed over: %s", self.path, number, error)
                continue
            clients[key.raw] = client
            names.add(client.name)
        self._clients = clients
