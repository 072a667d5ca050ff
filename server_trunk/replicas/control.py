"""Small words between rank 0 and each other replica, over the gloo control group.

One thread receives from each peer, one sends: gloo's calls wait. A connection that breaks without a goodbye means that the peer's
process is gone.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from server_trunk.replicas.group import Group
from server_trunk.replicas.words import Bye, Word, decode, encode
from splitfl.errors import SplitflError

__all__ = ["Control"]

#: No honest word is larger: a client's name and number for each of very many.
_MAX_BYTES = 64 * 2**20


class Control:
    """``take(rank, word)`` is called for each word that comes, ``lost(rank, error)`` when a peer is gone; from threads of this
    object. Rank 0 speaks with all, the others with rank 0 alone.
    """

    def __init__(self, group: Group, take: Callable[[int, Word], None], lost: Callable[[int, Exception], None]) -> None:
        self._group, self._take, self._lost = group, take, lost
        self.peers: Sequence[int] = range(1, group.size) if group.is_first else (0,)
        self._out: queue.SimpleQueue[tuple[int, Word] | None] = queue.SimpleQueue()
        self._receivers = [
            threading.Thread(target=self._receive, args=(peer,), name=f"from-replica-{peer}", daemon=True) for peer in self.peers
        ]
        self._sender = threading.Thread(target=self._send, name="to-replicas", daemon=True)

    def start(self) -> None:
        for thread in (*self._receivers, self._sender):
            thread.start()

    def tell(self, peer: int, word: Word) -> None:
        """Send a word after all before it; returns at once. From any thread."""
        self._out.put((peer, word))

    def close(self, timeout: float) -> bool:
        """Say goodbye and wait for that of all peers; False where one has not answered within ``timeout`` seconds a thread."""
        for peer in self.peers:
            self.tell(peer, Bye())
        self._out.put(None)
        threads = [*self._receivers, self._sender]
        for thread in threads:
            if thread.ident is not None:
                thread.join(timeout)
        return not any(thread.is_alive() for thread in threads)

    def _send(self) -> None:
        while (item := self._out.get()) is not None:
            peer, word = item
            content = torch.frombuffer(bytearray(encode(word)), dtype=torch.uint8)
            try:
                dist.send(torch.tensor([len(content)]), group_dst=peer, group=self._group.control)
                dist.send(content, group_dst=peer, group=self._group.control)
            except RuntimeError as error:
                if not isinstance(word, Bye):
                    self._lost(peer, error)
                    return

    def _receive(self, peer: int) -> None:
        length = torch.zeros(1, dtype=torch.int64)
        try:
            while True:
                dist.recv(length, group_src=peer, group=self._group.control)
                size = int(length)
                if not 0 < size <= _MAX_BYTES:
                    raise SplitflError(f"a word of {size} bytes from replica {peer}")
                content = torch.empty(size, dtype=torch.uint8)
                dist.recv(content, group_src=peer, group=self._group.control)
                word = decode(content.numpy().tobytes())
                if isinstance(word, Bye):
                    return
                self._take(peer, word)
        except Exception as error:
            self._lost(peer, error)
