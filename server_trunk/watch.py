"""Whether the other processes of a server live: each gives rank 0 a sign of life, which rank 0 returns.

A process that dies breaks its connections, which is known at once. A machine that loses its power, or a process that hangs,
breaks nothing: it is known by its silence. The signs are a thread's own, so one that is merely busy is not taken for dead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from splitfl.errors import SplitflError, first_line

__all__ = ["Watch"]

#: Seconds between two signs of life, at most.
_BEAT = 1.0
_FOR_EVER = timedelta(days=365)

_ALIVE, _GOODBYE = 0, 1


class Watch:
    """``failure`` is set once another process is gone; this one is then to end too."""

    def __init__(self, limit: float, lost: Callable[[Watch], None] = lambda watch: None) -> None:
        """All processes make one at the same point, after they have joined. ``limit``: seconds of silence after which a process
        is taken for dead (0: none is long enough). ``lost`` hears of the first one that is gone, in a thread of this object.
        """
        self._limit, self._lost = limit, lost
        self.hung: int | None = None  # the rank whose silence has been too long
        self._beat = min(_BEAT, limit / 5) if limit else _BEAT
        self._group = dist.new_group(backend="gloo", timeout=_FOR_EVER)
        self._rank = dist.get_rank()
        self.peers: Sequence[int] = range(1, dist.get_world_size()) if self._rank == 0 else (0,)
        self._silent = dict.fromkeys(self.peers, 0.0)  # seconds
        self._left: set[int] = set()  # who has said goodbye
        self._lock = threading.Lock()
        self._leaving, self._over = threading.Event(), threading.Event()
        self.failure: SplitflError | None = None
        talk = self._answer if self._rank == 0 else self._ask
        self._threads = [threading.Thread(target=self._talk, args=(talk, peer), daemon=True) for peer in self.peers]
        for thread in (*self._threads, threading.Thread(target=self._count, daemon=True)):
            thread.start()

    def close(self, timeout: float) -> None:
        """Say goodbye: that this process ends is as it should be. Waits at most so many seconds for that of the others."""
        self._leaving.set()
        for thread in self._threads:
            thread.join(timeout)
        self.mute()

    def mute(self) -> None:
        """Say nothing of others any more: this process ends on account of its own."""
        self._over.set()

    # --- a thread a peer --------------------------------------------------------------------------------------------------------

    def _talk(self, talk: Callable[[int], None], peer: int) -> None:
        try:
            talk(peer)
        except RuntimeError as error:
            self._gone(peer, first_line(error))
        else:
            self._left.add(peer)

    def _ask(self, peer: int) -> None:
        """At any process but rank 0, which hears from it and answers; until either says goodbye."""
        while True:
            last = self._leaving.wait(self._beat)
            self._send(peer, _GOODBYE if last else _ALIVE)
            if self._receive(peer) == _GOODBYE or last:
                return

    def _answer(self, peer: int) -> None:
        while True:
            last = self._receive(peer) == _GOODBYE or self._leaving.is_set()
            self._send(peer, _GOODBYE if last else _ALIVE)
            if last:
                return

    def _send(self, peer: int, word: int) -> None:
        dist.send(torch.tensor([word]), group_dst=peer, group=self._group)

    def _receive(self, peer: int) -> int:
        word = torch.empty(1, dtype=torch.int64)
        dist.recv(word, group_src=peer, group=self._group)
        self._silent[peer] = 0.0
        return int(word)

    # --- silence ----------------------------------------------------------------------------------------------------------------

    def _count(self) -> None:
        # In beats of its own: a process that was stopped for a while, as all on a machine that slept, must not blame the others.
        while not self._over.wait(self._beat):
            for peer in self.peers:
                if peer in self._left:
                    continue
                self._silent[peer] += self._beat
                if self._limit and self._silent[peer] > self._limit:
                    self.hung = peer
                    self._gone(peer, f"silent for {self._limit:g} s")
                    return

    def _gone(self, peer: int, why: str) -> None:
        with self._lock:
            if self.failure is not None or self._over.is_set():
                return
            self.failure = SplitflError(f"process {peer} of this server is gone ({why}), so this one ends too")
        self._lost(self)
