"""Addresses that the kernel keeps away from a listening socket (Linux): their SYN packets are dropped before anybody is woken.

A classic BPF program (McCanne & Jacobson, USENIX 1993) on the listener; it needs no rights. Connections that stand are not
touched: each was accepted under the program of its time, which did not name its address. Elsewhere there is no such thing, and
who begins too many connections is cut off after it was accepted.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import socket
import struct
import sys
from collections.abc import Sequence

#: More addresses are not kept away: a program has at most 4096 instructions.
MOST = 256

_ATTACH, _DETACH = 26, 27
_LOAD_WORD, _LOAD_BYTE, _SHIFT, _IF_EQUAL, _JUMP, _RETURN = 0x20, 0x30, 0x74, 0x15, 0x05, 0x06
_NETWORK_HEADER = 0xFFF00000
_DROP, _PASS = 0, 0xFFFFFFFF

Instruction = tuple[int, int, int, int]  # opcode, jump if true, jump if false, operand


def program(networks: Sequence[str]) -> list[Instruction]:
    """Drops packets from these networks (IPv4 addresses and IPv6 /64) and passes all others. What is no network is left out."""
    parsed = []
    for network in networks[:MOST]:
        with contextlib.suppress(ValueError):
            parsed.append(ipaddress.ip_network(network))
    four: list[Instruction] = [(_LOAD_WORD, 0, 0, _NETWORK_HEADER + 12)]
    six: list[Instruction] = []
    for each in parsed:
        source = int(each.network_address)
        if each.version == 4:
            four += [(_IF_EQUAL, 0, 1, source), (_RETURN, 0, 0, _DROP)]
        else:
            six += [
                (_LOAD_WORD, 0, 0, _NETWORK_HEADER + 8),
                (_IF_EQUAL, 0, 3, source >> 96),
                (_LOAD_WORD, 0, 0, _NETWORK_HEADER + 12),
                (_IF_EQUAL, 0, 1, source >> 64 & 0xFFFFFFFF),
                (_RETURN, 0, 0, _DROP),
            ]
    passed: Instruction = (_RETURN, 0, 0, _PASS)
    four.append(passed)
    version: list[Instruction] = [(_LOAD_BYTE, 0, 0, _NETWORK_HEADER), (_SHIFT, 0, 0, 4), (_IF_EQUAL, 1, 0, 4)]
    return [*version, (_JUMP, 0, 0, len(four)), *four, *six, passed]


def shut_out(listener: socket.socket, networks: Sequence[str]) -> bool:
    """Keeps exactly these networks away from the listener; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        if not networks:
            listener.setsockopt(socket.SOL_SOCKET, _DETACH, 0)
            return True
        code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program(networks))
        buffer = ctypes.create_string_buffer(code, len(code))
        listener.setsockopt(socket.SOL_SOCKET, _ATTACH, struct.pack("HP", len(code) // 8, ctypes.addressof(buffer)))
    except OSError:
        return False
    return True
