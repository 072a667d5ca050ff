"""torchrun's rendezvous where there is one machine: a store on loopback, a new one for each start of the processes.

torchrun's own would listen on all interfaces, and unpickle what whoever reaches it has put there.
"""

from __future__ import annotations

import socket

from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

__all__ = ["LOOPBACK", "register_loopback"]

#: The name for ``--rdzv-backend``.
LOOPBACK = "splitfl-loopback"
_HOST = "127.0.0.1"


def register_loopback() -> None:
    """Make the name known to torchrun in this process."""
    rendezvous_handler_registry.register(LOOPBACK, _Loopback)


class _Loopback(RendezvousHandler):
    """The one agent meets itself; its processes meet in the store."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        self._store: TCPStore | None = None

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return LOOPBACK

    def next_rendezvous(self) -> RendezvousInfo:
        listener = socket.create_server((_HOST, 0))
        port = listener.getsockname()[1]
        self._store = TCPStore(_HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
        # What the agent says to itself it need not say over a socket.
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(_HOST, port))

    def num_nodes_waiting(self) -> int:
        return 0

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        self._store = None
        return True
