"""Byte credits: how much payload a client may have under way. The whole payload of a message is charged when it begins.

Charging whole messages, in order, is what excludes a deadlock: if two half-sent messages could share the window,
neither would ever be complete, and only complete messages give credit back.
"""

from __future__ import annotations

from splitfl.errors import LocalProtocolError, RemoteProtocolError


class CreditAccount:
    """One side's count of the credit left, in bytes; never below zero, never above the window."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.left = window

    def covers(self, size: int) -> bool:
        """Whether a message of ``size`` bytes may begin now (the client's question)."""
        return size <= self.left

    def spend(self, size: int) -> None:
        """The client begins a message it knows to be covered."""
        if size > self.left:
            raise LocalProtocolError(f"a message of {size} bytes exceeds the credit of {self.left}")
        self.left -= size

    def charge(self, size: int) -> None:
        """The server sees a message begin. Raises RemoteProtocolError when the client had not the credit."""
        if size > self.left:
            raise RemoteProtocolError(f"the client sent {size} bytes with a credit of {self.left}")
        self.left -= size

    def give(self, size: int) -> None:
        """The server gives back. Raises LocalProtocolError when more comes back than went out."""
        if self.left + size > self.window:
            raise LocalProtocolError(f"{size} bytes of credit given back with {self.window - self.left} outstanding")
        self.left += size

    def receive(self, size: int) -> None:
        """The client gets some back. Raises RemoteProtocolError when that exceeds the window."""
        if self.left + size > self.window:
            raise RemoteProtocolError(f"the server gave {size} bytes of credit with {self.window - self.left} outstanding")
        self.left += size
