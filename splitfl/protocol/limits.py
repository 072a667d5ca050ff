"""What the operator may limit for one client, in its line of ``authorized_clients``: ``key=value`` after its name."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from splitfl.errors import KeyFileError

Limit = int | float | str

#: The least of each limit, and what it bounds. All are whole numbers.
LIMITS: Mapping[str, tuple[int, str]] = {
    "bytes_per_second": (1, "payload that its sessions send, bytes a second"),
    "tokens_per_second": (1, "tokens of its forwards, a second"),
    # A part of the ends of a round must fit into it.
    "window": (4 * 2**20, "bytes that one of its sessions may have in flight"),
    "sessions": (1, "its sessions at a time"),
    "max_rank": (1, "the rank of its own adapter"),
}


#: Sessions at a time of a client whose line does not say: each may have a window of bytes in flight, so there is always a limit.
SESSIONS = 8


def parse_limit(name: str, text: str) -> Limit:
    """The value of one limit. Raises KeyFileError with one sentence."""
    if name not in LIMITS:
        close = get_close_matches(name, list(LIMITS), n=1)
        mend = f"did you mean {close[0]}" if close else f"there are {', '.join(LIMITS)}"
        raise KeyFileError(f"there is no limit {name[:32]!r}: {mend}")
    least, _ = LIMITS[name]
    if not text.isascii() or not text.isdigit() or len(text) > 15 or int(text) < least:
        raise KeyFileError(f"the limit {name} is a whole number from {least}, not {text[:32]!r}")
    return int(text)
