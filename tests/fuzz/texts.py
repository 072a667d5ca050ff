"""What people paste, and what lies in files: keys, join strings, lines of authorized_clients, addresses; words of replicas."""

from __future__ import annotations

import contextlib

from server_trunk.replicas import words
from splitfl.channel.datapath import data_address
from splitfl.errors import ConfigError, KeyFileError, RemoteProtocolError
from splitfl.protocol.join import JoinString
from splitfl.protocol.keys import PublicKey, parse_line
from tests.fuzz.sentences import check_sentence

__all__ = ["replicas", "texts"]


def texts(data: bytes) -> None:
    text = data.decode(errors="replace")
    try:
        join = JoinString.parse(text)
    except ConfigError:
        pass
    else:
        assert JoinString.parse(str(join)) == join
    with contextlib.suppress(KeyFileError):
        assert str(PublicKey.parse(text)) == text.strip()
    try:
        parsed = parse_line(text)
    except KeyFileError as error:
        check_sentence(error)
    else:
        assert parsed is None or parsed[1].name.strip(".")
    try:
        host, port = data_address(text, "dialled")
    except RemoteProtocolError:
        pass
    else:
        assert host
        assert 0 < port < 65536


def replicas(data: bytes) -> None:
    try:
        word = words.decode(data)
    except RemoteProtocolError:
        return
    assert repr(words.decode(words.encode(word))) == repr(word)  # as NaN is not NaN
