"""What a leader tells its followers: batches as plain values and the tensors they run on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from server_trunk.decoding import Decoding, Run
from server_trunk.members import BackwardBatch, ForwardBatch, Member
from server_trunk.sharding.kept import FollowedSequences
from splitfl.protocol.messages import Forward, decode_data, encode
from splitfl.tensors import dtype_name

__all__ = ["describe_backward", "describe_decode", "describe_forward", "read_backward", "read_decode", "read_forward"]


def describe_forward(batch: ForwardBatch) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """The command, and ``hidden: (tokens, H)`` of all members behind one another."""
    members = [_describe(member) for member in batch.members]
    command = {"do": "forward", "number": batch.number, "keep": batch.keep, "members": members}
    return command, [torch.cat([member.hidden for member in batch.members])]


def read_forward(command: dict[str, Any], tensors: Sequence[torch.Tensor]) -> ForwardBatch:
    members = [_read(member) for member in command["members"]]
    for member, hidden in zip(members, tensors[0].split([member.tokens for member in members]), strict=True):
        member.hidden = hidden
    return ForwardBatch(command["number"], members, command["keep"])


def describe_backward(batch: BackwardBatch) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """The command; the gradients ``(tokens, H)`` of those members that have one; and, where no graph was kept, ``hidden``."""
    members = [_describe(member) for member in batch.members]
    command = {"do": "backward", "number": batch.number, "kept": batch.kept, "members": members}
    tensors = [torch.cat([member.gradient for member in batch.members if member.backward is not None])]
    if not batch.kept:
        tensors.append(torch.cat([member.hidden for member in batch.members]))
    return command, tensors


def read_backward(command: dict[str, Any], tensors: Sequence[torch.Tensor]) -> BackwardBatch:
    members = [_read(member) for member in command["members"]]
    own = [member for member in members if member.backward is not None]
    for member, gradient in zip(own, tensors[0].split([member.tokens for member in own]), strict=True):
        member.gradient = gradient
    if not command["kept"]:
        for member, hidden in zip(members, tensors[1].split([member.tokens for member in members]), strict=True):
            member.hidden = hidden
    return BackwardBatch(command["number"], members, command["kept"])


def describe_decode(runs: Sequence[Run]) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """The command, with the number of the sequence that each run goes on; and ``hidden: (tokens, H)`` of all runs."""
    about = [(run.length, run.start, run.follows.number) for run in runs]  # type: ignore[attr-defined]
    command = {"do": "decode", "adapter_on": runs[0].of.forward.adapter_on, "runs": about}
    return command, [torch.cat([run.of.hidden[run.begin : run.begin + run.length] for run in runs])]


def read_decode(command: dict[str, Any], tensors: Sequence[torch.Tensor], sequences: FollowedSequences) -> list[Run]:
    """As if all were of one forward."""
    (hidden,) = tensors
    segments = tuple((length, start) for length, start, _ in command["runs"])
    dtype, adapter_on = dtype_name(hidden.dtype), command["adapter_on"]
    one = Decoding("", "", Forward(0, 0, segments, hidden.shape[1], dtype, "raw", False, False, adapter_on), hidden, 0.0)
    runs: list[Run] = []
    begin = 0
    for index, (length, start, number) in enumerate(command["runs"]):
        runs.append(Run(one, index, begin, length, start, sequences[number]))
        begin += length
    return runs


def _describe(member: Member) -> dict[str, Any]:
    return {
        "client": member.client,
        "ordinal": member.ordinal,
        "replayed": member.replayed,
        "spoilt": member.spoilt,
        "forward": encode(member.forward),
        "backward": None if member.backward is None else encode(member.backward),
    }


def _read(plain: dict[str, Any]) -> Member:
    forward: Any = decode_data(plain["forward"], from_client=True)
    backward: Any = None if plain["backward"] is None else decode_data(plain["backward"], from_client=True)
    return Member(
        "",
        forward,
        None,
        plain["client"],
        plain["ordinal"],
        plain["replayed"],
        backward=backward,
        abandoned=backward is None,
        spoilt=plain["spoilt"],
    )
