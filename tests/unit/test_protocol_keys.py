"""Keys as text, key files, the authorized_clients file, join strings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from zmq.utils import z85

from splitfl.errors import ConfigError, KeyFileError
from splitfl.protocol.join import JoinString
from splitfl.protocol.keys import (
    AuthorizedClient,
    AuthorizedClients,
    Identity,
    PublicKey,
    parse_line,
    public_path,
    read_identity,
    write_identity,
)

ONE = Identity.from_secret(bytes(range(32)))
TWO = Identity.from_secret(bytes(range(1, 33)))
LETTERS = "abcdefghijklmnopqrstuvwxyz234567"


def test_pairs_are_those_of_curve() -> None:
    for identity in (ONE, Identity.generate()):
        assert z85.encode(identity.public.raw) == zmq.curve_public(z85.encode(identity.secret))
    public, secret = zmq.curve_keypair()
    assert Identity.from_secret(z85.decode(secret)).public.raw == z85.decode(public)


@settings(deadline=None)
@given(st.binary(min_size=32, max_size=32))
def test_text_comes_back(raw: bytes) -> None:
    key = PublicKey(raw)
    text = str(key)
    assert PublicKey.parse(text) == key
    assert len(text) == 68
    assert text == text.lower()
    assert not set(text) & set("@:/#?= ")


@settings(deadline=None)
@given(st.integers(12, 67), st.sampled_from(LETTERS))
def test_one_wrong_letter_is_a_typo(position: int, letter: str) -> None:
    text = str(ONE.public)
    wrong = text[:position] + letter + text[position + 1 :]
    if wrong == text:
        return
    with pytest.raises(KeyFileError, match="typo"):
        PublicKey.parse(wrong)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "begins with splitfl-pub-"),
        ("ssh-ed25519 AAAA", "begins with splitfl-pub-"),
        (ONE.secret_text(), "a public key .* is wanted here"),
        (str(ONE.public)[:-1], "56 characters after splitfl-pub-, this one 55"),
        (str(ONE.public)[:-1] + "0", "letters a to z and the digits 2 to 7"),
        ("splitfl-pub-" + str(ONE.public)[12:].upper(), "letters a to z"),
    ],
)
def test_what_is_no_key_is_named(text: str, says: str) -> None:
    with pytest.raises(KeyFileError, match=says) as caught:
        PublicKey.parse(text)
    assert ONE.secret_text()[12:] not in str(caught.value)


def test_secrets_do_not_show() -> None:
    assert ONE.secret_text()[12:] not in repr(ONE)
    assert repr(ONE.secret) not in repr(ONE)
    assert str(ONE.public) in repr(ONE)


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "new" / "client.key"
    identity = write_identity(path)
    assert read_identity(path) == identity
    assert public_path(path).read_text() == f"{identity.public}\n"
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_bytes()
    with pytest.raises(KeyFileError, match="never overwritten"):
        write_identity(path)
    assert path.read_bytes() == before
    path.unlink()
    with pytest.raises(KeyFileError, match=r"\.pub exists"):
        write_identity(path)
    with pytest.raises(KeyFileError, match="make one with splitfl keygen"):
        read_identity(path)


@pytest.mark.skipif(os.name != "posix", reason="Windows has no mode bits")
def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "client.key"
    write_identity(path, ONE)
    for mode in (0o640, 0o604, 0o620):
        path.chmod(mode)
        with pytest.raises(KeyFileError, match="chmod 600"):
            read_identity(path)
    path.chmod(0o400)
    assert read_identity(path) == ONE


@pytest.mark.parametrize("text", ["", "# nothing\n", "splitfl-sec-abc\n", f"{ONE.public}\n", "a\nb\n"])
def test_a_damaged_key_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "client.key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(KeyFileError, match=r"client\.key"):
        read_identity(path)


def test_lines_of_the_list() -> None:
    line = f"  {ONE.public}  hospital-a  tokens_per_second=65536 sessions=2  # since May"
    assert parse_line(line) == (
        ONE.public,
        AuthorizedClient("hospital-a", {"tokens_per_second": 65536, "sessions": 2}),
    )
    assert parse_line("# only a comment") is None
    assert parse_line("   ") is None


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"{ONE.public}", "a name must follow"),
        (f"{ONE.public} a/b", "the name 'a/b' must have"),
        (f"{ONE.public} a 65536", "write key=value"),
        (f"{ONE.public} a sessions=", "write key=value"),
        (f"{ONE.public} a sessions=1 sessions=2", "given twice"),
        (f"{ONE.public} a session=1", "did you mean sessions"),
        (f"{ONE.public} a colour=red", "there are bytes_per_second, tokens_per_second"),
        (f"{ONE.public} a sessions=0", "a whole number from 1, not '0'"),
        (f"{ONE.public} a window=1000", "a whole number from 4194304"),
        (f"{ONE.public} a bytes_per_second=1e6", "a whole number from 1, not '1e6'"),
        (f"{ONE.public} a bytes_per_second=-5", "a whole number from 1, not '-5'"),
        (f"{ONE.secret_text()} a", "public key"),
        ("alice splitfl-pub-", "begins with"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "authorized_clients"
    path.write_text(f"# clients\n{line}\n")
    with pytest.raises(KeyFileError, match=says) as caught:
        AuthorizedClients(path)
    assert "line 2" in str(caught.value)


def test_the_list_is_read_again_when_it_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "authorized_clients"
    with pytest.raises(KeyFileError, match="there is no file"):
        AuthorizedClients(path)
    path.write_text(f"{ONE.public} one\n")
    clients = AuthorizedClients(path)
    assert clients.lookup(ONE.public) == AuthorizedClient("one")
    assert clients.lookup(TWO.public) is None
    assert not clients.refresh()
    path.write_text(f"{ONE.public} one\n{TWO.public} two sessions=3\n")
    assert clients.lookup(TWO.public) == AuthorizedClient("two", {"sessions": 3})
    path.write_text(f"{TWO.public} two\nrubbish on a line\n")
    assert clients.lookup(ONE.public) is None
    assert clients.lookup(TWO.public) == AuthorizedClient("two")
    assert "line 2, passed over" in caplog.text
    path.write_text(f"{TWO.public} two\n{TWO.public} again\n{ONE.public} two\n")
    assert clients.lookup(ONE.public) is None, "a name on two lines would make two clients look like one"
    path.unlink()
    assert clients.lookup(TWO.public) is None
    assert "no client is admitted" in caplog.text


@pytest.mark.parametrize(
    ("host", "shown"),
    [("127.0.0.1", "127.0.0.1"), ("trunk.example.org", "trunk.example.org"), ("fe80::1%eth0", "[fe80::1%eth0]")],
)
def test_join_strings_come_back(host: str, shown: str) -> None:
    join = JoinString(ONE.public, host, 7000, "my-run")
    assert str(join) == f"splitfl://{ONE.public}@{shown}:7000/my-run"
    assert JoinString.parse(f"  {join}\n") == join
    assert JoinString.parse(f"splitfl://{ONE.public}@{shown}:7000") == JoinString(ONE.public, host, 7000, "run")
    assert JoinString.parse(f"splitfl://{ONE.public}@{shown}:7000/").run == "run"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("http://x@h:1/r", "begins with splitfl://"),
        (f"splitfl://{ONE.public}", "no @"),
        ("splitfl://key@h:1/r", "key: a key begins with"),
        (f"splitfl://{str(ONE.public)[:-1]}@h:1/r", "56 characters"),
        (f"splitfl://{ONE.public}@", "no host:port"),
        (f"splitfl://{ONE.public}@host/run", "no host:port|no port"),
        (f"splitfl://{ONE.public}@host:/run", "no port number"),
        (f"splitfl://{ONE.public}@host:70000/run", "not between 1 and 65535"),
        (f"splitfl://{ONE.public}@host:0/run", "not between 1 and 65535"),
        (f"splitfl://{ONE.public}@host:٣/run", "no port number"),
        (f"splitfl://{ONE.public}@::1:7000/run", "stands in brackets"),
        (f"splitfl://{ONE.public}@[::1:7000/run", r"no closing \]"),
        (f"splitfl://{ONE.public}@[::1]7000/run", "no port number"),
        (f"splitfl://{ONE.public}@[zz::1]:7000/run", "not an IPv6 address"),
        (f"splitfl://{ONE.public}@ho st:7000/run", "not a host name"),
        (f"splitfl://{ONE.public}@host:7000/run?x=1", "nothing may follow"),
        (f"splitfl://{ONE.public}@host:7000/a/b", "the run name 'a/b'"),
    ],
)
def test_each_mistake_in_a_join_string_has_its_sentence(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        JoinString.parse(text)


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_a_join_string_or_a_config_error(text: str) -> None:
    for candidate in (text, f"splitfl://{text}", f"splitfl://{ONE.public}@{text}"):
        try:
            join = JoinString.parse(candidate)
        except ConfigError:
            continue
        assert JoinString.parse(str(join)) == join


def test_keys_of_another_size() -> None:
    with pytest.raises(KeyFileError, match="a public key has 32 bytes, not 31"):
        PublicKey(bytes(31))
    with pytest.raises(KeyFileError, match="a secret key has 32 bytes, not 33"):
        Identity.from_secret(bytes(33))


def test_files_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyFileError, match="the key cannot be written to"):
        write_identity(tmp_path / "file" / "key")
    odd = tmp_path / "odd"
    odd.write_bytes(b"\xff\xfe")
    odd.chmod(0o600)
    with pytest.raises(KeyFileError, match="cannot be read"):
        read_identity(odd)
    with pytest.raises(KeyFileError, match="cannot be read"):
        AuthorizedClients(odd)


def test_a_list_that_becomes_unreadable_admits_nobody(tmp_path: Path) -> None:
    path = tmp_path / "authorized_clients"
    path.write_text(f"{ONE.public} one\n")
    clients = AuthorizedClients(path)
    assert clients.lookup(ONE.public) is not None
    path.write_bytes(b"\xff" * 7)
    assert clients.lookup(ONE.public) is None
    path.write_text(f"{ONE.public} one\n")
    assert clients.lookup(ONE.public) is not None
