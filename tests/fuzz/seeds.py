"""Where a search begins: what honest sides say, as inputs of each target."""

from __future__ import annotations

from collections.abc import Iterable

import msgpack

from server_trunk.replicas import words
from splitfl.protocol import messages as m
from splitfl.protocol.ciphers import AES_256_GCM
from splitfl.protocol.keys import Identity
from splitfl.protocol.records import FIRST, JOINED, LAST, METADATA, PAYLOAD
from splitfl.protocol.schedule import KemKey
from tests.fuzz.pieces import joined

__all__ = ["frames_at_once", "seeds"]

_CIPHERS = (AES_256_GCM,)
_MODEL = {"config": "0" * 64, "index": None, "shards": {"model.safetensors": "1" * 64}, "revision": None}
_ENDS = (("a.lora_A", ("float32", (2, 8))), ("b.lora_A", ("bfloat16", (3,))))

FROM_CLIENT: tuple[m.Message, ...] = (
    m.Hello(m.PROTOCOL_VERSION, "run", {"torch": "2"}, "here"),
    m.Open(bytes(32), KemKey().public, _CIPHERS, _MODEL, (1, 1), "a"),
    m.Open(bytes(32), KemKey().public, _CIPHERS, _MODEL, (1, 1), "a", {"rank": 4, "alpha": 8.0, "learning_rate": 1e-4}, "s"),
    m.Enrol((3, 2), True),
    m.StepDone(0, 1, 1, "continue"),
    m.Pause(),
    m.Leave(),
    m.Heartbeat(1.5),
    m.Bye(3),
    m.Ends(_ENDS[:1], True),
    m.Ends(_ENDS[1:]),
    m.AskNorm(0, 1),
    m.StepDone(0, 1, 1, "pause", 0.5),
)
FROM_SERVER: tuple[m.Message, ...] = (
    m.Welcome(m.PROTOCOL_VERSION, "run", {"cut": "1:1", "lora": {"rank": 8}, "names": ["a"]}, {"torch": "2"}, 0.0),
    m.Opened("s", bytes(32), 15, "tcp://*:7001", bytes(32), bytes(1088), AES_256_GCM, 16384, 8192, 4096, 3),
    m.Refused("full", "the run is full"),
    m.Redirect("", 7000),
    m.StepOpened(0, 1),
    m.StepClosed(0, 9, 2, 0.1, None, 4, True, 1, True),
    m.Credit(5),
    m.Heartbeat(0.0),
    m.Fault("stale", "late", False, 1),
    m.Fault("seal", "broken"),
    m.Closing("goodbye", True),
    m.RoundOpened(0),
    m.RoundClosed(0, 2, 8),
    m.TrunkNorm(0, 0.5),
)
DATA_FROM_CLIENT: tuple[m.Message, ...] = (
    m.Attach(),
    m.Forward(0, 0, ((3, 0), (2, 7)), 8, "float32", "raw", True, True, True, 1),
    m.Forward(-1, 1, ((4, 0),), 8, "float32", "raw", False, False, False),
    m.Backward(0, 0, 5, 8, "float32", "raw", 4, 5.0, True),
    m.EndsPart(0, 0, 0, 64),
    m.Forward(-1, 2, ((4, 0), (1, 9)), 8, "float32", "raw", False, False, True, 0, ((0, (-1, 0)), (1, (3, 9)))),
    m.Release((0, 3)),
)
DATA_FROM_SERVER: tuple[m.Message, ...] = (
    m.Attached(),
    m.Hidden(0, 0, 5, 8, "bfloat16", "raw"),
    m.Grad(0, 0, 5, 8, "float64", "raw"),
    m.AveragePart(0, 1, 0, 6),
)
#: Data messages that fit the protocol, and no run of width 8 in float32 with 64 positions.
_MISFITS: tuple[m.Message, ...] = (
    m.Forward(0, 0, ((2, 0),), 16, "float32", "raw", True, True, True),
    m.Forward(0, 0, ((2, 0),), 8, "bfloat16", "raw", True, True, True),
    m.Forward(0, 0, ((2, 0),), 8, "float32", "raw", False, True, True),
    m.Forward(0, 0, ((8, 60),), 8, "float32", "raw", True, True, True),
    m.EndsPart(0, 0, 0, 64),
    m.Forward(0, 0, ((2**16, 0),), 8, "float32", "raw", True, True, True),
)
_WORDS: tuple[words.Word, ...] = (
    words.State(3, words.Phase.IN, 4, 1, 0, {"a": 5}, 1, (3, 2), ("a",)),
    words.Presence({"a": 2.0}, ("a",), ("b",), True),
    words.StopAsked(20.0),
    words.Stays("a", 1),
    words.Move("a", 0, 1, 2),
    words.Grant(4),
    words.WaitedFor(),
    words.Close(4, True, {"a": 5}, 2, words.Move("a", 0, 1)),
    words.Close(4, False),
    words.GoBack(2),
    words.Drain(),
    words.Stop(True),
    words.Bye(),
)


def _acts(act: int, messages: Iterable[m.Message]) -> list[bytes]:
    return [bytes([act]) + m.encode(message) for message in messages]


def _sealed(act: int, message: m.Message, number: int, payload: bytes, record: int) -> list[bytes]:
    """One data message as pieces for :func:`tests.fuzz.nullcipher.record`."""
    total = len(payload).to_bytes(4, "big")
    head = bytes([act, METADATA, FIRST if payload else FIRST | LAST, number]) + total
    pieces = [head + m.encode(message)]
    for at in range(0, len(payload), record):
        last = LAST if at + record >= len(payload) else 0
        pieces.append(bytes([act, PAYLOAD, last, number]) + total + payload[at : at + record])
    return pieces


def _assembled(messages: Iterable[tuple[m.Message, int]], record: int) -> list[bytes]:
    """Messages one after the other, as :func:`tests.fuzz.records.assembly` takes them."""
    pieces = []
    for number, (message, size) in enumerate(messages):
        total = size.to_bytes(2, "big")
        pieces.append(bytes([METADATA, FIRST if size else FIRST | LAST, number]) + total + m.encode(message))
        for at in range(0, size, record):
            last = LAST if at + record >= size else 0
            pieces.append(bytes([PAYLOAD, last, number]) + total + bytes(min(record, size - at)))
    return pieces


def frames_at_once(pieces: Iterable[bytes], kind: int = 1, head: int = 8) -> list[bytes]:
    """The same with each message's metadata and the first record of its payload in one frame. ``kind``: where a piece says its
    kind; ``head``: its bytes before the plaintext.
    """
    frames: list[bytes] = []
    for piece in pieces:
        if frames and piece[kind] == PAYLOAD and frames[-1][kind : kind + 2] == bytes([METADATA, FIRST]):
            metadata = bytearray(frames.pop())
            metadata[kind + 1] |= JOINED
            piece = bytes(metadata) + piece[head:]
        frames.append(piece)
    return frames


def _interleaved() -> bytes:
    """Two messages of two records each, taken in turns."""
    forward = m.encode(m.Forward(-1, 0, ((10, 0),), 4, "float16", "raw", False, False, True))
    total = (80).to_bytes(2, "big")
    pieces = [bytes([METADATA, FIRST, number]) + total + forward for number in (0, 1)]
    pieces += [bytes([PAYLOAD, 0, number]) + total + bytes(64) for number in (1, 0)]
    pieces += [bytes([PAYLOAD, LAST, number]) + total + bytes(16) for number in (0, 1)]
    return joined(pieces)


def _step(client: int, step: int, micro: int) -> list[bytes]:
    """One client's part of a step, as :func:`tests.fuzz.trunk.trunk` takes it."""
    forward, back, done = (
        (client, 3, step, micro, 2, 0, micro, 0),
        (client, 5, step, micro, 2, 0, 2, 0),
        (client, 6, step, 0, 1, 1, 0, 0),
    )
    return [bytes(piece) for piece in (forward, back, done)]


def seeds(name: str) -> list[bytes]:
    """Inputs of the target ``name``."""
    if name == "control":
        odd = msgpack.packb({"type": m.Pause.TYPE, "\x1b[2J" * 200: 1})
        return [*(m.encode(message) for message in (*FROM_CLIENT, *FROM_SERVER)), odd]
    if name == "metadata":
        return [m.encode(message) for message in (*DATA_FROM_CLIENT, *DATA_FROM_SERVER)]
    if name == "replicas":
        return [words.encode(word) for word in _WORDS]
    if name == "texts":
        public = str(Identity.from_secret(bytes(range(32))).public)
        ends = ("127.0.0.1:7000/my-run", "[fe80::1%eth0]:7000", "host.example:1/", "h:7000/r?x")
        lines = (
            f"{public} hospital-a  max_tokens=65536 rate=1.5 note=x # since May",
            "# none",
            f"{public}",
            f"{public} .. a=1 a=2",
        )
        return [
            text.encode()
            for text in (*(f"splitfl://{public}@{end}" for end in ends), public, *lines, "tcp://*:7001", "tcp://[::1]:7")
        ]
    if name == "records":
        data = _sealed(1, DATA_FROM_CLIENT[1], 0, bytes(160), 64)
        return [joined(data), joined(frames_at_once(data)), joined([b"\0" + bytes(48), b"\0" + b"\1" * 60])]
    if name == "assembly":
        few = [(DATA_FROM_CLIENT[0], 0), (DATA_FROM_CLIENT[1], 160), (DATA_FROM_CLIENT[4], 64), (DATA_FROM_CLIENT[2], 128)]
        begun = [
            bytes([METADATA, FIRST, number]) + (64).to_bytes(2, "big") + m.encode(DATA_FROM_CLIENT[4]) for number in range(9)
        ]
        said = _assembled(few, 64)
        return [joined(said), joined(frames_at_once(said, 0, 5)), _interleaved(), joined(begun)]
    if name == "server":
        honest = [b"\3", *_acts(0, FROM_CLIENT[3:4]), b"\4\0\0", *_sealed(2, DATA_FROM_CLIENT[1], 1, bytes(160), 4096)]
        honest += [*_acts(0, FROM_CLIENT[4:5]), b"\4\1\0", b"\6\0\xa0", b"\5\1", *_acts(0, FROM_CLIENT[5:])]
        at_once = [b"\3", *_acts(0, FROM_CLIENT[3:4]), *frames_at_once(_sealed(2, DATA_FROM_CLIENT[1], 1, bytes(160), 4096))]
        slow = _acts(0, FROM_CLIENT[:2])
        large = m.Forward(-1, 0, ((256, 0),), 8, "float32", "raw", False, False, True)
        return [
            joined(honest),
            joined(at_once),
            joined([*slow, b"\5\1", b"\5\5"]),
            joined([*slow, b"\7x", b"\1" + bytes(60)]),
            joined([b"\3", b"\10" + bytes(60)]),
            joined([b"\0" + msgpack.packb({"type": 1, "protocol": 9}), *_acts(0, FROM_CLIENT[:1])]),
            joined(_acts(0, [FROM_CLIENT[3], m.Hello(m.PROTOCOL_VERSION, "another", {}, "")])),
            joined([*slow, *_acts(0, FROM_CLIENT[3:4])]),
            joined(bytes([9, number]) + m.encode(FROM_CLIENT[0]) for number in range(18)),
            joined(_acts(10, FROM_CLIENT[:1])),
            joined(_acts(0, [FROM_CLIENT[0], m.Open(bytes(32), bytes(1184), ("none",), {}, (1, 1), "a")])),
            joined(_acts(0, [FROM_CLIENT[0], m.Open(bytes(32), b"\xff" * 1184, _CIPHERS, {}, (1, 1), "a")])),
            joined(_acts(0, [FROM_CLIENT[0], m.Open(bytes(32), bytes(1184), _CIPHERS, {}, (1, 1), "refused")])),
            joined([b"\3", *(_sealed(2, large, number, bytes(8192), 8192)[0] for number in (1, 2, 3))]),
        ]
    if name == "client":
        told = [b"\4", b"\5\0", *_acts(0, FROM_SERVER[4:5]), *_sealed(2, DATA_FROM_SERVER[1], 1, bytes(80), 4096), b"\5\1"]
        told += [*_acts(0, FROM_SERVER[5:8]), b"\5\3", *_acts(0, FROM_SERVER[8:9]), *_acts(0, FROM_SERVER[11:])]
        answers = _sealed(2, DATA_FROM_SERVER[1], 1, bytes(80), 4096)
        refused = [joined(_acts(0, (message,))) for message in FROM_SERVER[2:4]]
        return [
            joined(told),
            joined([b"\4", *frames_at_once(answers)]),
            joined([*_acts(0, FROM_SERVER[:1]), b"\3", *_acts(0, FROM_SERVER[1:2])]),
            joined([b"\4", b"\5\5", *_acts(0, FROM_SERVER[10:11])]),
            *refused,
        ]
    if name == "payloads":
        said = [*_acts(0, FROM_CLIENT[9:11]), *_acts(0, FROM_CLIENT[3:4]), b"\2", *_acts(1, DATA_FROM_CLIENT[1:])]
        asked = [*_acts(0, FROM_CLIENT[:3])]
        alone = [*_acts(1, _MISFITS), *_acts(0, FROM_CLIENT[3:4])]
        return [
            *(b"\0" + joined([piece]) for piece in alone),
            b"\0" + joined(_acts(0, [*FROM_CLIENT[9:11], FROM_CLIENT[10]])),
            b"\0" + joined(_acts(0, [m.Ends((("b", ("float32", (1,))), ("a", ("float32", (1,)))))])),
            b"\0" + joined(said),
            b"\0" + joined(asked),
            b"\1" + joined(asked),
            b"\0" + joined([*_acts(0, FROM_CLIENT[9:11]), b"\3"]),
            b"\0" + joined([*_acts(0, FROM_CLIENT[9:11]), b"\2", *_acts(1, [m.EndsPart(0, 1, 0, 6)])]),
        ]
    assert name == "trunk", name
    enrol = [bytes([client, 2, 0, 0, 0, 0, 0, 1]) for client in (0, 1)]
    steps = [*enrol, *_step(0, 0, 0), *_step(1, 0, 0), *_step(0, 1, 1), *_step(1, 1, 1)]
    lost = [*enrol, *_step(0, 0, 0)[:1], bytes([0, 1, 1]), bytes([0, 0, 1]), bytes([0, 2]), *_step(0, 0, 0), *_step(1, 0, 0)]
    decode = [bytes([client, 4, 0, 0, 1, kind, parent, 1]) for client in (0, 1) for kind, parent in ((4, 4), (5, 12), (4, 20))]
    decode += [bytes([0, 7, 0, 0, 5, 0, 1]), bytes([1, 1]), *decode]
    left = [*enrol, *_step(0, 0, 0), bytes([0, 7]), bytes([1, 8]), bytes([2, 4, 0, 1, 1]), bytes([0, 9, 0, 0, 1])]
    return [bytes([kind]) + joined(pieces) for kind in range(0, 48, 3) for pieces in (steps, lost, left, decode)]
