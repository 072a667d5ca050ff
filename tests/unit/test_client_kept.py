"""Ends that were kept: what is looked at before a tensor is read, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from client_ends.kept import kept_meta, put_into
from splitfl.checkpoint import save_checkpoint
from splitfl.errors import CheckpointError


def kept(directory: Path, part: str) -> Path:
    save_checkpoint(directory, {"weight": torch.ones(2)}, {"part": part, "num_labels": 3})
    return directory


def test_what_a_checkpoint_says_of_itself_costs_no_look_at_its_tensors(tmp_path):
    directory = kept(tmp_path / "ends", "ends")
    (directory / "trainables.safetensors").write_bytes(b"")
    assert kept_meta(directory)["num_labels"] == 3
    with pytest.raises(CheckpointError, match="damaged"):
        put_into(None, directory, {})


@pytest.mark.parametrize("use", [kept_meta, lambda directory: put_into(None, directory, {})])
def test_a_trunk_is_no_clients_ends(tmp_path, use):
    with pytest.raises(CheckpointError, match="holds the trunk, not a client's ends: name the --out of splitfl train"):
        use(kept(tmp_path / "trunk", "trunk"))
