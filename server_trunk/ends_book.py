"""What the clients of a run train of their ends, where it averages them: the first to say it says it for all.

The I/O thread takes what clients say and holds every part against it before memory is given; the trunk's thread asks for parts.
"""

from __future__ import annotations

import threading
from collections import deque

from splitfl.adapters.layout import Layout, PartCursor
from splitfl.errors import Refused, RemoteProtocolError
from splitfl.protocol.messages import Ends, EndsPart, RefusalCode

__all__ = ["EndsBook"]

#: Messages of one client that say what it trains: 32768 tensors.
_MOST_MESSAGES = 256


class EndsBook:
    """Safe to call from any thread."""

    def __init__(self, *, averaged: bool, part_bytes: int) -> None:
        self.averaged, self.part_bytes = averaged, part_bytes
        self.layout: Layout | None = None  # of the run
        self._kept = False  # whether an average of it is kept
        self._held = False  # whether a round is open
        self._said: dict[str, list[Ends]] = {}  # by session that has yet to say more
        self._declared: dict[str, Layout] = {}  # by session
        self._asked: dict[str, deque[tuple[int, PartCursor]]] = {}
        self._lock = threading.Lock()

    def declare(self, session: str, message: Ends) -> None:
        """A session says what it trains.

        Raises:
            Refused: it is not what the others train; one sentence with the mend.
            RemoteProtocolError: it may not say so, or not now.
        """
        with self._lock:
            if not self.averaged or session in self._declared:
                raise RemoteProtocolError("Ends, which nobody asked for")
            said = self._said.setdefault(session, [])
            said.append(message)
            if len(said) > _MOST_MESSAGES:
                raise RemoteProtocolError("more tensors of the ends than any model has")
            if message.more:
                return
            theirs = Layout.from_messages(self._said.pop(session))
            if self.layout is None:
                self.layout = theirs
            difference = self.layout.difference(theirs)
            if difference is not None:
                raise Refused(
                    RefusalCode.ENDS,
                    f"this run averages ends trained as {self.layout.describe()}, and yours are {theirs.describe()}: "
                    f"{difference}; use the same --ends as the other clients",
                )
            self._declared[session] = self.layout

    def check_enrol(self, session: str) -> None:
        """Raises RemoteProtocolError where a session that takes part has not said what it trains."""
        with self._lock:
            if self.averaged and session not in self._declared:
                raise RemoteProtocolError("Enrol before Ends, in a run that averages the ends")

    def hold(self) -> None:
        """A round is open: what is on its way is of this layout, though everybody leave meanwhile."""
        with self._lock:
            self._held = True

    def let_go(self) -> None:
        """The round is over, and nothing was averaged."""
        with self._lock:
            self._held = False
            self._forget_if_unused()

    def keep(self, layout: Layout) -> list[str]:
        """An average is kept: the layout of the run's ends is settled. Returns the sessions that have said another: the average
        was first made on another replica, whose clients were first.
        """
        with self._lock:
            self.layout, self._kept, self._held = layout, True, False
            return [session for session, theirs in self._declared.items() if theirs != layout]

    def ask(self, session: str, number: int) -> None:
        """From now on the session may send its ends for round ``number``."""
        with self._lock:
            if session in self._declared:
                assert self.layout is not None
                self._asked.setdefault(session, deque()).append((number, PartCursor(self.layout, self.part_bytes)))

    def begin(self, session: str, message: EndsPart) -> None:
        """A part begins to arrive. Raises RemoteProtocolError where it is not the next of those that were asked for."""
        with self._lock:
            asked = self._asked.get(session)
            if not asked or asked[0][0] != message.round:
                raise RemoteProtocolError(f"ends for round {message.round}, which nobody asked for")
            asked[0][1].take(message)
            if asked[0][1].at_end:
                asked.popleft()

    def left(self, session: str) -> None:
        """A session is over. When nobody is left and nothing was averaged yet, others may begin anew."""
        with self._lock:
            self._said.pop(session, None)
            self._asked.pop(session, None)
            self._declared.pop(session, None)
            self._forget_if_unused()

    def _forget_if_unused(self) -> None:
        if not self._declared and not self._kept and not self._held:
            self.layout = None
