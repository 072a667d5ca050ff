"""What a leader tells its followers: batches as plain values and the tensors they run on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from server_trunk.members import BackwardBatch, ForwardBatch, Member
from splitfl.protocol.messages import decode_data, encode

__all__ = ["describe_backward", "describe_forward", "read_backward", "read_forward"]


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
