"""Whether a lost link is worth another attempt, and when that comes: by exponential backoff with full jitter (Brooker,
"Exponential Backoff and Jitter", AWS 2015).
"""

from __future__ import annotations

import random

from splitfl.errors import ConnectError, Refused, SealError, SessionLost
from splitfl.protocol.messages import RefusalCode

__all__ = ["may_pass", "pause_before"]

#: Seconds: the first attempt comes within ``_BASE``, later ones within twice the time of the one before, up to ``_MOST``.
_BASE, _MOST = 0.5, 30.0

#: Why a session may end that the next one need not end for.
_PASSING = frozenset({"lost", "restarting", RefusalCode.MOVED, RefusalCode.SEAL, RefusalCode.STALE, RefusalCode.FULL})


def may_pass(error: BaseException) -> bool:
    """Whether it is worth trying again: the link, or a server that is not there; not a word that means this client."""
    if isinstance(error, SessionLost | Refused):
        return error.code in _PASSING
    return isinstance(error, SealError | ConnectError)


def pause_before(attempt: int) -> float:
    """Seconds before an attempt to connect, from 0 on."""
    return random.uniform(0, min(_MOST, _BASE * 2 ** min(attempt, 16)))
