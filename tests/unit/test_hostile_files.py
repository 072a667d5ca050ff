"""Files and flags of any content: a config, a state or a clear sentence, and never another exception."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitfl.checkpoint import DESCRIPTION, load_checkpoint, load_meta, save_checkpoint
from splitfl.config import build_config, read_toml, to_toml
from splitfl.errors import CheckpointError, ConfigError, KeyFileError
from splitfl.packed_state import pack_state, unpack_state
from splitfl.protocol.keys import AuthorizedClients, Identity, PublicKey, read_identity, write_identity
from splitfl.settings import SETTINGS_BY_KEY

SHARED = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = st.text(st.characters(blacklist_categories=("Cs",)), max_size=20)
PORTS = st.builds(lambda host, port: f"{host}:{port}", TEXT, st.sampled_from(["1", "²", "65536", "٣", "-1", "9" * 40, ""]) | TEXT)


def says_something(error: Exception) -> None:
    assert str(error)


VALUES: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([10**400, -(10**400)]),
    st.floats(),
    TEXT,
    PORTS,
    st.sampled_from(["9" * 40, "step", "4", "async", "hierarchical", "per-client", "tensor", "²"]),
    st.lists(TEXT, max_size=3),
    st.dictionaries(TEXT, TEXT, max_size=2),
)
KEYS = st.sampled_from(sorted(SETTINGS_BY_KEY))


@SHARED
@given(st.dictionaries(KEYS | TEXT, VALUES, max_size=4))
def test_any_settings_are_a_config_that_reads_back_or_one_sentence(tmp_path: Path, values: dict[str, Any]) -> None:
    try:
        config = build_config({"model": "m"} | values)
    except ConfigError as error:
        says_something(error)
        return
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert build_config(read_toml(file)) == config


@SHARED
@given(st.binary(max_size=80) | TEXT.map(str.encode) | st.builds(lambda key, value: f"{key} = {value}".encode(), KEYS, TEXT))
def test_any_bytes_are_toml_or_one_sentence(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(content)
    try:
        build_config({"model": "m"} | read_toml(file))
    except ConfigError as error:
        says_something(error)


@pytest.mark.parametrize(
    "content",
    ["x = " + "[" * 5000, "clients = " + "9" * 5000, "clients = " + "9" * 400, 'bind = "h:²"', 'sync = "' + "9" * 5000 + '"'],
)
def test_a_config_that_python_itself_chokes_on(tmp_path: Path, content: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError):
        build_config({"model": "m"} | read_toml(file))


def test_a_window_that_the_protocol_cannot_say() -> None:
    with pytest.raises(ConfigError, match="window"):
        build_config({"model": "m", "window": 2**40 + 1})
    assert build_config({"model": "m", "window": 2**40}).window == 2**40


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["..", "../x", "/x", "a/../b", ".", "", "a//b", "x\0", "trainables.safetensors", "trainables/x"])


@SHARED
@given(st.data())
def test_a_checkpoint_whose_description_says_anything(tmp_path: Path, data: st.DataObject) -> None:
    directory = tmp_path / "checkpoint"
    save_checkpoint(directory, {"w": torch.zeros(2)}, {"step": 1}, {"more": b"x"})
    description = json.loads((directory / DESCRIPTION).read_text())
    where = data.draw(st.sampled_from(["format", "meta", "files", "meta_sha256", "all", "entry", "name", "digest"]))
    if where == "all":
        description = data.draw(JSON)
    elif where == "entry":
        description["files"]["more"] = data.draw(JSON | st.just(["bytes", "sha256"]))
    elif where == "digest":
        description["files"]["more"][data.draw(st.sampled_from(["bytes", "sha256"]))] = data.draw(JSON)
    elif where == "name":
        description["files"][data.draw(NAMES)] = data.draw(st.sampled_from([description["files"]["more"]]) | JSON)
    else:
        description[where] = data.draw(JSON)
    (directory / DESCRIPTION).write_text(json.dumps(description))
    for read in (load_checkpoint, load_meta):
        try:
            read(directory)
        except CheckpointError as error:
            says_something(error)


@pytest.mark.parametrize("name", ["../x", "..", "/x", "a//b"])
def test_a_checkpoint_never_points_outside_itself(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "checkpoint"
    save_checkpoint(directory, {"w": torch.zeros(2)}, {"step": 1})
    description = json.loads((directory / DESCRIPTION).read_text())
    description["files"][name] = description["files"]["trainables.safetensors"]
    (directory / DESCRIPTION).write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="not as it was saved"):
        load_checkpoint(directory)


def test_a_description_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / DESCRIPTION).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path)


@settings(deadline=None)
@given(st.binary(max_size=60), st.integers(0, 400), st.integers(0, 255))
def test_a_state_of_any_bytes(content: bytes, at: int, byte: int) -> None:
    good = bytearray(pack_state({"a": [torch.zeros(2), 1.5, None], 3: ("x", True)}))
    good[at % len(good)] = byte
    for each in (content, bytes(good), bytes(good[:at])):
        try:
            unpack_state(each)
        except CheckpointError as error:
            says_something(error)


IDENTITY = Identity.from_secret(bytes(range(32)))
LINES = st.lists(
    TEXT
    | st.sampled_from(
        [IDENTITY.secret_text(), IDENTITY.secret_text().upper(), IDENTITY.secret_text()[:-1], str(IDENTITY.public), "# x", "\x85"]
    )
    | st.builds(lambda words: f"{IDENTITY.public} {' '.join(words)}", st.lists(TEXT, max_size=3)),
    max_size=4,
).map(lambda lines: "\n".join(lines).encode())


@SHARED
@given(LINES | st.binary(max_size=60))
def test_a_key_file_of_any_content(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "key"
    file.touch(mode=0o600)
    file.write_bytes(content)
    try:
        assert read_identity(file) == IDENTITY
    except KeyFileError as error:
        says_something(error)


@SHARED
@given(LINES | st.binary(max_size=60))
def test_a_list_of_clients_of_any_content(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "authorized_clients"
    file.write_bytes(content)
    try:
        listed = AuthorizedClients(file)
    except KeyFileError as error:
        says_something(error)
        file.write_text("")
        listed = AuthorizedClients(file)
        file.write_bytes(content)  # once it serves, a bad line is passed over
    client = listed.lookup(IDENTITY.public)
    assert client is None or client.name.strip(".")


def test_keys_of_another_length_and_places_that_cannot_be_written(tmp_path: Path) -> None:
    for make in (PublicKey, Identity.from_secret):
        with pytest.raises(KeyFileError, match="32 bytes"):
            make(bytes(31))
    (tmp_path / "file").touch()
    with pytest.raises(KeyFileError, match="cannot be written"):
        write_identity(tmp_path / "file" / "key")
