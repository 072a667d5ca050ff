"""Adapters of clients over several replicas: each is where its client is, and nowhere summed.

A replica makes or loads an adapter when its client comes, so it may have come from any other: from the newest checkpoint, which
all replicas know and each writes its part of. Of what lies on several replicas the newest counts.
"""

from __future__ import annotations

from typing import Any

from server_trunk.adapter_book import AdapterBook
from server_trunk.client_adapters import ClientTraining
from server_trunk.replicas.group import Group
from splitfl.checkpoint import checkpoint_directory, client_directory, load_checkpoint
from splitfl.config import RunConfig
from splitfl.packed_state import unpack_state

__all__ = ["SpreadTraining"]


class SpreadTraining(ClientTraining):
    """The adapters of the clients of one replica. ``elsewhere`` has those that were kept and are not this replica's to keep."""

    holds_all = False

    def __init__(self, model: Any, config: RunConfig, book: AdapterBook, group: Group) -> None:
        super().__init__(model, config, book)
        self._run, self._group = config.out_dir, group

    def joined(self, client: str) -> None:
        """Raises CheckpointError where the client's adapter was kept and cannot be read."""
        kept, present = self.elsewhere.get(client, -1), self.adapters.get(client)
        if kept > (-1 if present is None else present.step):
            self.adapters.pop(client, None)  # made anew: what has run with it keeps what it ran with
            tensors, meta, extra = load_checkpoint(checkpoint_directory(client_directory(self._run, client), kept))
            self.load_client(client, tensors, {name: unpack_state(content) for name, content in extra.items()}, meta, kept)
        else:
            super().joined(client)

    def share(self) -> None:
        """All replicas say which adapters they have, up to which step: so each knows which are its own to keep, and all know
        what every client's adapter is like. All must call it at the same point, between steps.
        """
        mine = {client: (held.step, self._book.plain(client)) for client, held in self.adapters.items() if held.step >= 0}
        newest: dict[str, tuple[int, int]] = {}
        said = self._group.exchange(mine)
        for rank, theirs in enumerate(said):
            for client, (step, _) in theirs.items():
                if client not in newest or step > newest[client][0]:
                    newest[client] = step, rank
        for client, (step, rank) in newest.items():
            if rank == self._group.rank:
                self.elsewhere.pop(client, None)
            else:
                self.elsewhere[client] = step
                self._book.restore(client, said[rank][client][1])
