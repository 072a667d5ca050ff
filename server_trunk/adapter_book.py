"""What each client's own adapter is like: asked for by the client, within the operator's limits. No torch.

The I/O thread agrees at admission; the trunk's thread reads when it makes or trains an adapter.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from splitfl.config import RunConfig
from splitfl.errors import Refused
from splitfl.protocol.messages import RefusalCode

__all__ = ["AdapterBook", "AdapterSettings"]


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """One client's adapter: LoRA's rank and alpha, AdamW's learning rate (before its schedule) and weight decay."""

    rank: int
    alpha: float
    learning_rate: float
    weight_decay: float


class AdapterBook:
    """The settings of every client's adapter. Safe to call from any thread."""

    def __init__(self, config: RunConfig) -> None:
        self._shared = config.adapters != "per-client"
        self._limits = config.limits
        self._default = AdapterSettings(
            config.lora.rank, config.lora.alpha, config.optimizer.learning_rate, config.optimizer.weight_decay
        )
        self._settings: dict[str, AdapterSettings] = {}
        self._sessions: dict[str, str] = {}  # clients by open session
        self._trained: set[str] = set()
        self._lock = threading.Lock()

    def agree(self, client: str, asked: Mapping[str, Any], *, max_rank: int | None = None) -> AdapterSettings:
        """The settings that ``client`` would have; changes nothing. ``max_rank``: this client's own limit.

        What is not asked for is as the client's adapter has it already, or else as the run's config says. A client that comes
        back may ask for another learning rate and weight decay, but for no other rank and alpha once its adapter has trained.

        Raises:
            Refused: one sentence with the mend.
        """
        if self._shared:
            if asked:
                raise _refused(
                    "all clients of this run share one adapter, so nobody has settings of his own: leave the adapter's settings "
                    "out, or ask the operator for a run with adapters = per-client"
                )
            return self._default
        with self._lock:
            fixed = client in self._trained or client in self._sessions.values()
            present = self._settings.get(client) if fixed else None
        wanted = replace(present or self._default, **_checked(asked))
        if wanted.rank > self._limits.max_rank:
            raise _refused(f"the adapter's rank {wanted.rank} is above this run's limit: ask for at most {self._limits.max_rank}")
        if max_rank is not None and wanted.rank > max_rank:
            raise _refused(f"the adapter's rank {wanted.rank} is above your key's limit: ask for at most {max_rank}")
        if wanted.learning_rate > self._limits.max_learning_rate:
            raise _refused(
                f"the adapter's learning rate {wanted.learning_rate:g} is above this run's limit: ask for at most "
                f"{self._limits.max_learning_rate:g}"
            )
        if present is not None and (wanted.rank, wanted.alpha) != (present.rank, present.alpha):
            raise _refused(
                f"your adapter in this run has rank {present.rank} and alpha {present.alpha:g}, and keeps them: leave both out, "
                "or join under another name"
            )
        return wanted

    def settle(self, session: str, client: str, asked: Mapping[str, Any]) -> None:
        """As :meth:`agree`, and from now on it is so: a session of the client has opened."""
        wanted = self.agree(client, asked)
        with self._lock:
            self._settings[client] = wanted
            self._sessions[session] = client

    def left(self, session: str) -> None:
        """A session is over."""
        with self._lock:
            self._sessions.pop(session, None)

    def trained(self, client: str) -> None:
        """The client's adapter is no longer as it started: its rank and alpha are fixed."""
        with self._lock:
            self._trained.add(client)

    def of(self, client: str) -> AdapterSettings:
        """The settings of a client that has one."""
        with self._lock:
            return self._settings[client]

    # --- checkpoints ------------------------------------------------------------------------------------------------------------

    def plain(self, client: str) -> dict[str, Any]:
        """The settings of a client as plain values."""
        return asdict(self.of(client))

    def restore(self, client: str, plain: Mapping[str, Any]) -> None:
        """Take back what :meth:`plain` gave."""
        with self._lock:
            self._settings[client] = AdapterSettings(**plain)
            self._trained.add(client)


def _checked(asked: Mapping[str, Any]) -> dict[str, Any]:
    known = tuple(AdapterSettings.__dataclass_fields__)
    for name, value in asked.items():
        if name not in known:
            raise _refused(f"an adapter has no setting {name[:64]!r}: choose among {', '.join(known)}")
        whole = type(value) is int
        fits = whole if name == "rank" else (whole or type(value) is float) and math.isfinite(value)
        lowest = {"rank": 1}.get(name, 0)
        if not fits or value < lowest or (name == "alpha" and value == 0):
            what = "a whole number from 1" if name == "rank" else "a number above 0" if name == "alpha" else "a number from 0"
            raise _refused(f"the adapter's {name.replace('_', ' ')} is {what}, not {str(value)[:64]!r}")
    return {name: value if name == "rank" else float(value) for name, value in asked.items()}


def _refused(text: str) -> Refused:
    return Refused(RefusalCode.ADAPTER, text)
