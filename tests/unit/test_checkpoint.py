import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import splitfl.checkpoint
import splitfl.directories
from splitfl.checkpoint import (
    checkpoint_directory,
    checkpoint_steps,
    client_directory,
    load_checkpoint,
    load_meta,
    mend_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    prune_client_checkpoints,
    put_aside,
    save_checkpoint,
)
from splitfl.directories import write_directory_atomically
from splitfl.errors import CheckpointError, NotReadable, NotWritten
from tests.world import set_aside


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "model.layers.1.w": torch.randn(3, 4, generator=generator).to(torch.bfloat16),
        "a.transposed": torch.randn(5, 2, generator=generator).t(),
    }


def test_what_is_loaded_is_what_was_saved(tmp_path):
    meta = {"step": 7, "cut": [1, 1], "nested": {"x": 1.5, "y": None}}
    save_checkpoint(tmp_path / "c", tensors(), meta, {"optimizer.safetensors": b"\x00\x01"})
    loaded, loaded_meta, extra = load_checkpoint(tmp_path / "c")
    assert loaded_meta == meta == load_meta(tmp_path / "c")
    assert extra == {"optimizer.safetensors": b"\x00\x01"}
    assert loaded.keys() == tensors().keys()
    for name, value in tensors().items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)


def test_meta_comes_back_as_json_has_it(tmp_path):
    save_checkpoint(tmp_path / "c", {}, {"cut": (1, 2), "losses": {9: 0.1, 10: 1e300, 1: -0.0}})
    assert load_meta(tmp_path / "c") == {"cut": [1, 2], "losses": {"9": 0.1, "10": 1e300, "1": -0.0}}
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_checkpoint(tmp_path / "d", {}, {"loss": float("nan")})
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("name", ["trainables.safetensors", "optimizer.bin", "checkpoint.json"])
def test_one_flipped_bit_is_noticed(tmp_path, name):
    save_checkpoint(tmp_path / "c", tensors(), {"step": 7}, {"optimizer.bin": bytes(100)})
    file = tmp_path / "c" / name
    content = bytearray(file.read_bytes())
    position = content.index(b'"step": 7') + 8 if name == "checkpoint.json" else len(content) - 3
    content[position] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(tmp_path / "c")


def test_missing_and_foreign_files_are_refused(tmp_path):
    save_checkpoint(tmp_path / "c", tensors(), {}, {"optimizer.bin": b"x"})
    (tmp_path / "c" / "optimizer.bin").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.bin is missing"):
        load_checkpoint(tmp_path / "c")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_checkpoint(tmp_path)
    (tmp_path / "c" / "checkpoint.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(tmp_path / "c")


def test_a_later_format_is_named(tmp_path):
    save_checkpoint(tmp_path / "c", tensors(), {})
    file = tmp_path / "c" / "checkpoint.json"
    description = json.loads(file.read_text())
    description["format"] = 99
    file.write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="format 99"):
        load_checkpoint(tmp_path / "c")


def test_a_description_cannot_point_outside(tmp_path):
    (tmp_path / "secret").write_bytes(b"x")
    save_checkpoint(tmp_path / "c", tensors(), {})
    file = tmp_path / "c" / "checkpoint.json"
    description = json.loads(file.read_text())
    description["files"]["../secret"] = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    file.write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("name", ["checkpoint.json", "a/b", "../x", ".hidden", "trainables.safetensors"])
def test_further_files_have_plain_names(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be the name"):
        save_checkpoint(tmp_path / "c", {}, {}, {name: b""})


def test_a_failed_write_leaves_the_old_directory_and_no_rubbish(tmp_path):
    save_checkpoint(tmp_path / "c", tensors(), {"step": 1})

    def interrupted():
        with write_directory_atomically(tmp_path / "c", overwrite=True) as temporary:
            (temporary / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert load_meta(tmp_path / "c") == {"step": 1}
    assert os.listdir(tmp_path) == ["c"]


def test_writing_again_replaces_the_whole_directory(tmp_path):
    save_checkpoint(tmp_path / "c", tensors(), {"step": 1}, {"old": b""})
    save_checkpoint(tmp_path / "c", {}, {"step": 2})
    assert load_checkpoint(tmp_path / "c") == ({}, {"step": 2}, {})
    assert os.listdir(tmp_path) == ["c"]


def test_results_are_never_overwritten_unasked(tmp_path):
    (tmp_path / "c").mkdir()
    with write_directory_atomically(tmp_path / "c") as temporary:
        (temporary / "x").write_text("1")
    with pytest.raises(CheckpointError, match="exists already"), write_directory_atomically(tmp_path / "c"):
        pass
    assert (tmp_path / "c" / "x").read_text() == "1"


def test_newest_and_pruning(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for step in (5, 20, 100_000_000, 10):
        save_checkpoint(checkpoint_directory(tmp_path, step), {}, {"step": step})
    (tmp_path / "checkpoints" / "step-00000099").mkdir()  # no description inside: an interrupted copy, not a checkpoint
    (tmp_path / "checkpoints" / ".step-00000200.x.tmp").mkdir()
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert load_meta(newest) == {"step": 100_000_000}
    assert prune_checkpoints(tmp_path, keep=2) == [5, 10]
    assert checkpoint_steps(tmp_path) == [20, 100_000_000]
    assert not list((tmp_path / "checkpoints").glob(".step-*"))
    assert prune_checkpoints(tmp_path / "nothing", keep=1) == []


def test_what_was_undone_goes_with_what_is_as_old(tmp_path):
    for step in (3, 4, 9):
        save_checkpoint(checkpoint_directory(tmp_path, step), {}, {"step": step})
        put_aside(checkpoint_directory(tmp_path, step), "damaged" if step == 3 else "undone")
    for step in (2, 3, 4, 5):
        save_checkpoint(checkpoint_directory(tmp_path, step), {}, {"step": step})
    assert prune_checkpoints(tmp_path, keep=2) == [2, 3]
    left = ["damaged-step-00000003", "step-00000004", "step-00000005", "undone-step-00000004", "undone-step-00000009"]
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == left
    save_checkpoint(checkpoint_directory(tmp_path, 6), {}, {"step": 6})
    assert prune_checkpoints(tmp_path, keep=2) == [4]
    assert [entry.name for entry in (tmp_path / "checkpoints").glob("undone-*")] == ["undone-step-00000009"]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_a_directory_has_the_mode_of_any_new_directory(tmp_path):
    (tmp_path / "plain").mkdir()
    save_checkpoint(tmp_path / "c", {}, {})
    assert (tmp_path / "c").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("where", ["tensors", "state", "bytes", "description"])
def test_what_the_system_refuses_is_a_sentence_and_leaves_what_was_there(tmp_path, monkeypatch, where):
    """As on a full disk: `tests/faults` has a real one."""
    save_checkpoint(tmp_path / "c", tensors(), {"step": 1})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_in_rust(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    extra: dict[str, object] = {"optimizer": {"lr": 0.1}, "raw": b"x"}
    if where in ("tensors", "state"):
        monkeypatch.setattr(splitfl.checkpoint, "save_tensors" if where == "tensors" else "save_file", full_in_rust)
    else:
        monkeypatch.setattr(Path, "write_bytes" if where == "bytes" else "write_text", full)
    with pytest.raises(NotWritten, match=r"c cannot be written \(No space left on device\): make room"):
        save_checkpoint(tmp_path / "c", tensors(), {"step": 2}, extra)
    monkeypatch.undo()
    assert load_meta(tmp_path / "c") == {"step": 1}
    load_checkpoint(tmp_path / "c")
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize("swaps", [True, False])
def test_a_crash_amid_writing_anew_leaves_the_old_checkpoint_or_the_new_one(tmp_path, monkeypatch, swaps):
    """Whatever rename the process dies at: also where the system cannot swap two names."""
    directory = checkpoint_directory(tmp_path, 42)
    found = []
    for renames in range(2 if swaps else 3):
        save_checkpoint(directory, tensors(), {"step": 42, "of": "old"})
        left, replace, exchange = [renames], os.replace, splitfl.directories._exchange

        def counted(*names, rename, left=left):
            if not left[0]:
                raise KeyboardInterrupt  # the process is gone: nothing after this is done
            left[0] -= 1
            return rename(*names)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", functools.partial(counted, rename=replace))
            patch.setattr(
                "splitfl.directories._exchange", functools.partial(counted, rename=exchange) if swaps else lambda *_: False
            )
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            with contextlib.suppress(KeyboardInterrupt):
                save_checkpoint(directory, tensors(), {"step": 42, "of": "new"})
        mend_checkpoints(tmp_path)
        found.append(load_checkpoint(directory)[1]["of"])
        assert checkpoint_steps(tmp_path) == [42]
        assert prune_checkpoints(tmp_path, keep=1) == []
        assert os.listdir(tmp_path / "checkpoints") == [directory.name]
    assert found == (["old", "new"] if swaps else ["old", "old", "new"])


def test_what_was_set_aside_is_not_pruned(tmp_path):
    directory = checkpoint_directory(tmp_path, 42)
    save_checkpoint(directory, tensors(), {"step": 42})
    set_aside(directory)
    assert prune_checkpoints(tmp_path, keep=1) == []
    assert os.listdir(directory.parent) == [directory.name]
    load_checkpoint(directory)


def test_a_rename_that_is_refused_leaves_the_old_checkpoint_in_its_place(tmp_path, monkeypatch):
    """Where the system cannot swap two names, and the disk has no more room as the second is to be given."""
    directory = checkpoint_directory(tmp_path, 42)
    save_checkpoint(directory, tensors(), {"of": "old"})
    replace = os.replace

    def refused(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("splitfl.directories._exchange", lambda *_: False)
    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(NotWritten, match="No space left"):
        save_checkpoint(directory, tensors(), {"of": "new"})
    assert load_checkpoint(directory)[1]["of"] == "old"
    assert os.listdir(directory.parent) == [directory.name]


def test_what_was_set_aside_of_a_client_is_not_pruned(tmp_path):
    save_checkpoint(checkpoint_directory(tmp_path, 1), {}, {"clients": {"a": 1, "b": 1}})
    for client in "ab":
        directory = checkpoint_directory(client_directory(tmp_path, client), 1)
        save_checkpoint(directory, tensors(), {})
    set_aside(directory)
    prune_client_checkpoints(tmp_path)
    load_checkpoint(directory)
    assert os.listdir(directory.parent) == [directory.name]


def test_what_interrupted_writes_left_of_a_client_without_a_checkpoint_is_pruned(tmp_path):
    leftover = client_directory(tmp_path, "a") / "checkpoints" / ".step-00000001.1234.tmp"
    leftover.mkdir(parents=True)
    prune_client_checkpoints(tmp_path)
    assert not leftover.exists()


def refuse(code):
    def refused(*_, **__):
        raise OSError(code, os.strerror(code))

    return refused


@pytest.mark.parametrize("where", ["description", "digest"])
@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        (errno.EIO, CheckpointError, r"c is damaged, the disk does not give it back \(Input/output error\): use another"),
        (errno.EACCES, NotReadable, r"c cannot be read \(Permission denied\): mend that"),
        (errno.ESTALE, NotReadable, "c cannot be read"),
    ],
)
def test_what_the_system_does_not_read_is_a_sentence(tmp_path, monkeypatch, where, code, kind, said):
    save_checkpoint(tmp_path / "c", tensors(), {"step": 1})
    if where == "description":
        monkeypatch.setattr(Path, "read_text", refuse(code))
        with pytest.raises(kind, match=said):
            load_meta(tmp_path / "c")
    else:
        monkeypatch.setattr(splitfl.checkpoint, "file_digest", refuse(code))
    with pytest.raises(kind, match=said) as caught:
        load_checkpoint(tmp_path / "c")
    assert isinstance(caught.value, NotReadable) == (kind is NotReadable)


def test_a_directory_that_cannot_be_listed_or_renamed_in_is_a_sentence(tmp_path, monkeypatch):
    save_checkpoint(checkpoint_directory(tmp_path, 1), tensors(), {})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refuse(errno.EACCES))
        with pytest.raises(NotReadable, match="checkpoints cannot be read"):
            checkpoint_steps(tmp_path)
    monkeypatch.setattr(os, "replace", refuse(errno.EROFS))
    with pytest.raises(NotWritten, match="damaged-step-00000001, cannot be written"):
        put_aside(checkpoint_directory(tmp_path, 1), "damaged")


def test_while_a_checkpoint_cannot_be_read_no_clients_are_pruned(tmp_path):
    for step in (1, 2):
        save_checkpoint(checkpoint_directory(tmp_path, step), {}, {"clients": {"a": step}})
        save_checkpoint(checkpoint_directory(client_directory(tmp_path, "a"), step), {}, {})
    save_checkpoint(checkpoint_directory(client_directory(tmp_path, "a"), 0), {}, {})
    description = checkpoint_directory(tmp_path, 1) / "checkpoint.json"
    whole = description.read_text()
    description.write_text(whole[:-9])
    prune_client_checkpoints(tmp_path)
    assert checkpoint_steps(client_directory(tmp_path, "a")) == [0, 1, 2]
    description.write_text(whole)
    prune_client_checkpoints(tmp_path)
    assert checkpoint_steps(client_directory(tmp_path, "a")) == [1, 2]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="which file a handle is of, Linux says in /proc")
def test_all_is_flushed_before_a_checkpoint_gets_its_name(tmp_path, monkeypatch):
    flushed: list[str] = []
    named: list[str] = []
    flush, rename = os.fsync, os.replace

    def fsync(handle):
        flushed.append(os.readlink(f"/proc/self/fd/{handle}"))
        flush(handle)

    def replace(source, target):
        named.append(str(target))
        there = {os.path.join(folder, name) for folder, _, names in os.walk(source) for name in [*names, ""]}
        assert {path.rstrip("/") for path in there} <= set(flushed), "renamed before all of it was on the disk"
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    save_checkpoint(checkpoint_directory(tmp_path / "run", 3), tensors(), {"step": 3}, {"optimizer": {"lr": 0.1}})
    assert named == [str(checkpoint_directory(tmp_path / "run", 3))]
    assert flushed[-1] == str(tmp_path / "run" / "checkpoints")
    assert str(tmp_path / "run") in flushed
