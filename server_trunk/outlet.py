"""The way out of the trunk's thread."""

from __future__ import annotations

from typing import Any, Protocol

from splitfl.protocol.messages import Fault

__all__ = ["Outlet"]


class Outlet(Protocol):
    """Where answers go. Thread-safe; a session that is gone swallows what is sent to it."""

    def send(self, session: str, message: Any, payload: Any) -> None: ...
    def tell(self, session: str, message: Any) -> None: ...
    def credit(self, session: str, n: int) -> None: ...
    def end(self, session: str, fault: Fault) -> None: ...
