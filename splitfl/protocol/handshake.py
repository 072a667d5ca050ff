"""The messages that open a session, from Hello to Opened; or that say why none is opened, or where."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from splitfl.protocol.control import BULK, KEM_CIPHERTEXT_BYTES, KEM_PUBLIC_BYTES, MAX_STEP, SEALED, SECRET_BYTES, TICKET_BYTES
from splitfl.protocol.fields import integer, number, one_of, pair, plain, raw, sequence, short_text, texts
from splitfl.protocol.message import Message


@dataclass(frozen=True)
class Hello(Message):
    """The client's first message. ``libraries``: name to version; a difference is a warning, never a refusal."""

    protocol: int
    run: str
    libraries: dict[str, str]
    platform: str

    TYPE: ClassVar[int] = 1
    FIELDS: ClassVar = {
        "protocol": integer(0, 2**16 - 1),
        "run": short_text(64, empty=False),
        "libraries": texts(64, 32),
        "platform": short_text(256),
    }


@dataclass(frozen=True)
class Welcome(Message):
    """Answers :class:`Hello`: the run's configuration, which the client checks before it opens. ``time``: Unix
    seconds.
    """

    protocol: int
    run: str
    config: dict[str, Any]
    libraries: dict[str, str]
    time: float

    TYPE: ClassVar[int] = 33
    FIELDS: ClassVar = {
        "protocol": integer(0, 2**16 - 1),
        "run": short_text(64, empty=False),
        "config": plain(),
        "libraries": texts(64, 32),
        "time": number(),
    }


@dataclass(frozen=True)
class Open(Message):
    """Opens the session: the client's secret, its ephemeral ML-KEM-768 key, its ciphers (best first), its model and
    cut.

    ``model`` is the model identity (plain msgpack values, opaque here); ``cut`` = (blocks in the input end, in the
    output end). ``adapter``: what the client asks for its own adapter in the trunk, where each client has one; empty
    for the run's defaults. ``replaces``: the session of this client's that was lost and that this one stands for, if any: it
    ends, should the server not have noticed its loss.
    """

    client_secret: bytes = field(repr=False)
    kem_public: bytes = field(repr=False)
    ciphers: tuple[str, ...]
    model: dict[str, Any]
    cut: tuple[int, int]
    name: str
    adapter: dict[str, Any] = field(default_factory=dict)
    replaces: str = ""

    TYPE: ClassVar[int] = 2
    FIELDS: ClassVar = {
        "client_secret": raw(SECRET_BYTES),
        "kem_public": raw(KEM_PUBLIC_BYTES),
        "ciphers": sequence(short_text(32, empty=False), 1, 8),
        "model": plain(nodes=1024),
        "cut": pair(integer(0, 65535), integer(0, 65535)),
        "name": short_text(64),
        "adapter": plain(depth=2, nodes=64),
        "replaces": short_text(64),
    }


@dataclass(frozen=True)
class Opened(Message):
    """Answers :class:`Open`. Sizes in bytes: ``window`` the credit granted, ``max_message`` the largest payload,
    ``record`` the plaintext of a full record. ``data_address``: ``tcp://host:port``; an empty host or ``*`` means the
    host that was dialled. ``step``: the run's open step, or the next to open. ``bulk``: one of BULK.
    """

    session: str
    ticket: bytes = field(repr=False)
    ticket_seconds: int
    data_address: str
    server_secret: bytes = field(repr=False)
    kem_ciphertext: bytes = field(repr=False)
    cipher: str
    window: int
    max_message: int
    record: int
    step: int = 0
    bulk: str = SEALED

    TYPE: ClassVar[int] = 34
    FIELDS: ClassVar = {
        "session": short_text(64, empty=False),
        "ticket": raw(TICKET_BYTES),
        "ticket_seconds": integer(1, 3600),
        "data_address": short_text(256, empty=False),
        "server_secret": raw(SECRET_BYTES),
        "kem_ciphertext": raw(KEM_CIPHERTEXT_BYTES),
        "cipher": short_text(32, empty=False),
        "window": integer(1, 2**40),
        "max_message": integer(1, 2**40),
        "record": integer(4096, 4 * 2**20),
        "step": integer(0, MAX_STEP),
        "bulk": one_of(BULK),
    }


@dataclass(frozen=True)
class Refused(Message):
    """Answers Hello or Open with no. This message keeps its form in every protocol version."""

    code: str
    text: str

    TYPE: ClassVar[int] = 35
    FIELDS: ClassVar = {"code": short_text(64, empty=False), "text": short_text(4096)}


@dataclass(frozen=True)
class Redirect(Message):
    """Answers Open: another endpoint of the same server, with the same key, takes this client. ``host`` empty: the host that was
    dialled.
    """

    host: str
    port: int

    TYPE: ClassVar[int] = 44
    FIELDS: ClassVar = {"host": short_text(256), "port": integer(1, 65535)}
