"""The other end of each way to send bytes that `benchmarks.channel` compares: one process that takes what is sent and answers.

A *burst* is so many messages of one size, of which the last is answered; an *echo* is one small message that is.
"""

from __future__ import annotations

import datetime
import socket
import ssl
import struct
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import zmq

from splitfl.channel.handler import Peer, SessionInfo
from splitfl.channel.server import ServerChannel
from splitfl.protocol.keys import AuthorizedClient, AuthorizedClients, Identity, PublicKey
from splitfl.protocol.messages import PROTOCOL_VERSION, Enrol, Hello, Hidden, Open, Redirect, StepOpened, Welcome
from splitfl.transport.zmq_server import ZmqServerTransport

MIB = 2**20
WINDOW = 256 * MIB
HEAD = struct.Struct("!QQ")  # messages of a burst, bytes of each


def run_peers(pipe: Connection) -> None:
    """Worker: gets the client's public key, says where each kind listens, and serves until it is told to end."""
    key = pipe.recv()
    with tempfile.TemporaryDirectory() as directory:
        context = zmq.Context(io_threads=2)
        plain, curve, pair = _router(context, None), None, Identity.generate()
        curve = _router(context, pair)
        listener, certificate = _tls(Path(directory))
        for target, argument in ((_take_zmq, plain[0]), (_take_zmq, curve[0]), (_take_tls, listener)):
            threading.Thread(target=target, args=(argument,), daemon=True).start()
        identity = Identity.generate()
        transport = ZmqServerTransport(identity, host="127.0.0.1")
        sink = _Sink()
        authorized = AuthorizedClients.of({PublicKey.parse(key): AuthorizedClient("bench")})
        server = ServerChannel(transport, sink, authorized=authorized, window=WINDOW, max_message=64 * MIB)
        sink.channel = server
        server.start()
        pipe.send(
            {
                "plain": plain[1],
                "curve": (curve[1], pair.public.raw),
                "tls": (listener[0].getsockname()[1], certificate),
                "ours": (transport.control_port, str(identity.public)),
            }
        )
        pipe.recv()
        server.stop()


def _router(context: zmq.Context[Any], pair: Identity | None) -> tuple[zmq.Socket[bytes], int]:
    sock = context.socket(zmq.ROUTER)
    if pair is not None:
        sock.setsockopt(zmq.CURVE_SERVER, 1)
        sock.setsockopt(zmq.CURVE_PUBLICKEY, pair.public.raw)
        sock.setsockopt(zmq.CURVE_SECRETKEY, pair.secret)
    sock.setsockopt(zmq.RCVHWM, 16)
    return sock, sock.bind_to_random_port("tcp://127.0.0.1")


def _take_zmq(sock: zmq.Socket[bytes]) -> None:
    while True:
        peer, head = sock.recv_multipart()
        if len(head) == HEAD.size:
            for _ in range(HEAD.unpack(head)[0]):
                sock.recv(copy=False)
                sock.recv(copy=False)
        sock.send_multipart([peer, head])


def _tls(directory: Path) -> tuple[tuple[socket.socket, ssl.SSLContext], str]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    text = certificate.public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (directory / "both.pem").write_bytes(secret + text)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(directory / "both.pem")
    return (socket.create_server(("127.0.0.1", 0)), context), text.decode()


def _take_tls(listening: tuple[socket.socket, ssl.SSLContext]) -> None:
    listener, context = listening
    raw, _ = listener.accept()
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock = context.wrap_socket(raw, server_side=True)
    buffer = memoryview(bytearray(64 * MIB))
    while True:
        count, size = HEAD.unpack(_exactly(sock, buffer[: HEAD.size]))
        for _ in range(count):
            _exactly(sock, buffer[:size])
        sock.sendall(b"done")


def _exactly(sock: ssl.SSLSocket, into: memoryview) -> memoryview:
    got = 0
    while got < len(into):
        read = sock.recv_into(into[got:])
        if not read:
            raise EOFError
        got += read
    return into


class _Sink:
    """Gives the credit of each message back as soon as it is there, and answers those that are numbered for it; opens a step for
    whoever enrols.
    """

    def __init__(self) -> None:
        self.channel: ServerChannel | None = None
        self.step = 0

    def welcome(self, peer: Peer, hello: Hello) -> Welcome:
        return Welcome(PROTOCOL_VERSION, hello.run, {}, {}, time.time())

    def admit(self, peer: Peer, open: Open) -> int:
        return 0

    def elsewhere(self, peer: Peer) -> Redirect | None:
        return None

    def on_opened(self, session: SessionInfo) -> None: ...

    def allocate(self, session: str, message: Any) -> tuple[Any, memoryview]:
        import torch

        from splitfl.tensors import receive_buffer

        return receive_buffer(1, message.payload_bytes // 2, torch.bfloat16)

    def on_data(self, session: str, message: Any, payload: Any) -> None:
        assert self.channel is not None
        self.channel.credit(session, message.payload_bytes)
        if message.ordinal:
            self.channel.send(session, Hidden(-1, message.micro, 1, 1, "bfloat16", "raw"), bytes(2))

    def on_control(self, session: str, message: Any) -> None:
        assert self.channel is not None
        if isinstance(message, Enrol):
            self.step += 1
            self.channel.tell(session, StepOpened(self.step))

    def on_refused(self, who: str, code: str, text: str) -> None: ...

    def on_closed(self, session: str, reason: str, *, lost: bool) -> None: ...
