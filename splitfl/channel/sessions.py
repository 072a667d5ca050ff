"""The sessions of a server, as its I/O thread sees them: what comes in, what goes out, how they end.

Whatever happens in one session, an exception included, ends that session and nothing else.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from splitfl.channel.admission import Admission
from splitfl.channel.entrance import REMOVED, Entrance
from splitfl.channel.handler import ServerHandler, SessionInfo
from splitfl.channel.leaving import Leaving
from splitfl.channel.link import Link, Traffic
from splitfl.channel.offer import Offer
from splitfl.channel.timing import Timing
from splitfl.errors import OutOfTurn, Refused, RemoteProtocolError, SealError
from splitfl.protocol.fields import presentable
from splitfl.protocol.messages import (
    Attach,
    Attached,
    Bye,
    Closing,
    Credit,
    DataMessage,
    Fault,
    Forward,
    Heartbeat,
    Hello,
    Leave,
    Message,
    Open,
    OtherVersionError,
    Redirect,
    RefusalCode,
    encode,
)
from splitfl.protocol.messages import Refused as RefusedMessage
from splitfl.transport import wording
from splitfl.transport.base import Endpoint, Sent, ServerFrame, ServerTransport
from splitfl.transport.refusals import RefusalLog

_log = logging.getLogger(__name__)

_TEXT_BYTES = 4000
# Credit is given back in parts of at least the window's so-many-th, save to who may be in need of it.
_CREDIT_PARTS = 16


def is_due(link: Link) -> bool:
    """Whether credit is to be given back to this client now. Little is kept until there is more, while what the client has covers
    any message: each message about credit costs both sides several threads' turns.
    """
    due, account = link.credit_due, link.account
    if not due or account is None:
        return False
    return due >= account.window // _CREDIT_PARTS or account.left < link.max_message


class Sessions:
    """All links of one server. Everything runs on the I/O thread, save ``lock``, ``find``: other threads look sessions
    up and advance their state under the lock.
    """

    def __init__(
        self,
        transport: ServerTransport,
        handler: ServerHandler,
        admission: Admission,
        offer: Offer,
        timing: Timing,
        clock: Callable[[], float],
    ) -> None:
        self._transport, self._handler, self._admission = transport, handler, admission
        self._timing, self._clock = timing, clock
        # Guards each link's session and credit, and the tables of links.
        self.lock = threading.RLock()
        self._links: dict[bytes, Link] = {}  # by control peer
        self._sessions: dict[str, Link] = {}  # by session id, from Opened on
        self._traffic: dict[str, Traffic] = {}  # by the client's name
        self._leaving = Leaving(transport.hang_up, linger=timing.linger, remembered=timing.silence, clock=clock)
        self._refusals = RefusalLog(self.refusal, clock=clock)
        self._entrance = Entrance(transport, handler, admission, offer, timing, clock, self._refusals, self._leaving)
        # Those that may have something to send, in the order of their turns: of hundreds, few have at a time.
        self.active: dict[Link, None] = {}

    def find(self, session: str) -> Link | None:
        """The link of a session; None when it is gone."""
        with self.lock:
            return self._sessions.get(session)

    def traffic(self) -> dict[str, tuple[int, int]]:
        """Bytes of frames (received, sent) by client's name, over all its sessions."""
        with self.lock:
            return {name: (traffic.received, traffic.sent) for name, traffic in self._traffic.items()}

    def activate(self, link: Link) -> None:
        """Something may have to be sent to this client."""
        if self._sessions.get(link.id) is link and link not in self.active:
            self.active[link] = None
            link.moved = self._clock()

    def ready_links(self) -> list[Link]:
        """The active links whose data connection stands and whose client listens."""
        return [link for link in self.active if link.data_peer is not None and link.goodbye is None]

    def guard(self, link: Link, action: Callable[..., None], *arguments: Any) -> None:
        """Runs what belongs to one session; whatever it raises ends that session only."""
        try:
            action(*arguments)
        except Refused as error:
            self._refuse(link, error)
        except SealError as error:
            self.end(link, RefusalCode.SEAL, f"the session's seal is broken: {error}")
        except RemoteProtocolError as error:
            self.end(link, RefusalCode.PROTOCOL, f"this client broke the protocol: {error}")
        except Exception:
            _log.exception("session %s of %s failed", link.id or "(opening)", link.peer.name)
            self.end(link, RefusalCode.INTERNAL, "the server failed in this session: its log says where")

    # --- what goes out ---

    def deliver(self, link: Link, frame: bytes) -> None:
        """A control frame; a client that cannot be reached loses its session."""
        if link.control_peer not in self._links or link.goodbye is not None:
            return
        sent = self._send(link, frame)
        if sent is Sent.GONE:
            self.drop(link, "its control connection broke")
        elif sent is Sent.FULL:
            self.drop(link, "it does not read its control messages")

    def _send(self, link: Link, frame: bytes) -> Sent:
        link.traffic.sent += len(frame)
        link.told += 1
        return self._transport.send_control(link.control_peer, frame)

    def tell(self, link: Link, message: Message) -> None:
        """A control message of the channel's own."""
        with self.lock:
            frame = link.session.send(message)
        if frame is not None:
            self.deliver(link, frame)

    def give_credit(self, link: Link) -> float:
        """Gives back what the handler's owner has given, once the replies to this client do not pile up and it has not sent more
        than it may. Returns the seconds until the latter.
        """
        if link.outbox is None or link.account is None or not is_due(link) or link.outbox.pending > link.account.window:
            return 0.0
        wait = link.allowance.wait()
        if wait > 0:
            return wait
        with self.lock:
            due, link.credit_due = link.credit_due, 0
            link.account.give(due)
        self.tell(link, Credit(due))
        return 0.0

    # --- what comes in ---

    def take(self, frame: ServerFrame) -> None:
        """One frame from a client."""
        if frame.endpoint is Endpoint.CONTROL:
            link = self._links.get(frame.peer) or self._greet(frame)
        else:
            link = self._sessions.get(frame.user)
        if link is None:  # of a session that has ended, or was not to begin
            self._leaving.came(frame.endpoint, frame.peer)
            return
        link.heard = self._clock()
        link.traffic.received += len(frame.frame)
        self.guard(link, self._take_control if frame.endpoint is Endpoint.CONTROL else self._take_data, link, frame)

    def _greet(self, frame: ServerFrame) -> Link | None:
        link = self._entrance.greet(frame, self._links.values())
        if link is not None:
            with self.lock:
                self._links[frame.peer] = link
                link.traffic = self._traffic.setdefault(link.peer.name, link.traffic)
        return link

    def _take_control(self, link: Link, frame: ServerFrame) -> None:
        if frame.user != str(link.peer.public_key):
            raise RemoteProtocolError("the peer behind this session changed")
        link.tally.heard += 1
        # Its Hello was charged when it was let in.
        if link.hello is not None and not link.allowance.control(len(frame.frame)):
            raise RemoteProtocolError("more control messages than a client has use for")
        try:
            with self.lock:
                message = link.session.receive(bytes(frame.frame))
        except OtherVersionError as error:
            raise wording.other_version("client", error.theirs, "server") from None
        except OutOfTurn as error:
            link.tally.doubt(error, self._clock())
            return
        if isinstance(message, Heartbeat):
            link.tally.check(message, link.inbox.records if link.inbox is not None else 0, self._clock())
            return
        if message is None or link.tally.is_in_doubt:
            return
        if isinstance(message, Hello):
            link.hello = message
            self.tell(link, self._handler.welcome(link.peer, message))
        elif isinstance(message, Open):
            self._open(link, message)
        elif isinstance(message, Bye):
            link.goodbye = message.records
            self._part(link)
        elif link.attached:
            link.left = link.left or isinstance(message, Leave)
            self._handler.on_control(link.id, message)
        else:
            raise RemoteProtocolError(f"{type(message).__name__} before the data connection was attached")

    def _open(self, link: Link, message: Open) -> None:
        others = [other.id for other in self._sessions.values() if other.peer.name == link.peer.name and other.goodbye is None]
        granted = self._entrance.admit(link, message, others)
        if isinstance(granted, Redirect):
            self.tell(link, granted)
            self._forget(link)
            return
        link.open = message
        admit, charge = functools.partial(self._admit, link), functools.partial(self._charge, link)
        with self.lock:
            frame = self._entrance.open(link, *granted, admit=admit, charge=charge)
            self._sessions[link.id] = link
        self.deliver(link, frame)

    def _admit(self, link: Link, message: DataMessage) -> None:
        if isinstance(message, Attach) is link.attached:
            raise RemoteProtocolError("Attach comes first on a data connection, and once")
        with self.lock:
            link.session.check_receive(message)
        link.allowance.begun(message.payload_bytes, message.rows if isinstance(message, Forward) else 0, message.items)
        if link.allowance.flooded:
            raise RemoteProtocolError("more small messages than a client has use for")

    def _charge(self, link: Link, size: int) -> None:
        with self.lock:
            assert link.account is not None
            link.account.charge(size)
            due = is_due(link)
        if due:
            self.activate(link)  # what was kept is needed now

    def _take_data(self, link: Link, frame: ServerFrame) -> None:
        if link.data_peer is None:
            link.data_peer = frame.peer
        elif link.data_peer != frame.peer:
            raise RemoteProtocolError("a second data connection in one session")
        assert link.inbox is not None
        done = link.inbox.receive(frame.frame)
        if done is not None:
            self._take_message(link, *done)
        if link.goodbye is not None:
            self._part(link)

    def _part(self, link: Link) -> None:
        """Ends a session whose client has said goodbye, once what it sent before has arrived on the other connection.

        The client waits for the answer: a TCP connection that it closed while our replies are under way would be reset,
        and take along what it had sent.
        """
        assert link.goodbye is not None
        if link.inbox is not None and link.inbox.records < link.goodbye:
            return
        with self.lock:
            frame = link.session.send(Closing("goodbye"))
        self._send(link, frame or b"")
        self.drop(link, "the client said goodbye", lost=not link.left)

    def _take_message(self, link: Link, message: DataMessage, target: Any) -> None:
        if not isinstance(message, Attach):
            self._handler.on_data(link.id, message, target)
            return
        assert link.outbox is not None
        assert link.hello is not None
        assert link.open is not None
        link.attached = True
        # Told before Attached leaves: the client's first message finds a handler that knows the session.
        self._handler.on_opened(SessionInfo(link.id, link.peer, link.open, link.hello))
        link.outbox.add(Attached(), b"")
        self.activate(link)

    # --- endings ---

    def refusal(self, who: str, code: str, text: str) -> None:
        """Reports somebody who was not let in."""
        try:
            self._handler.on_refused(who, code, text)
        except Exception:
            _log.exception("on_refused failed")

    def _refuse(self, link: Link, error: Refused) -> None:
        code, text = presentable(error.code, 64) or RefusalCode.INTERNAL, presentable(str(error), _TEXT_BYTES)
        if link.attached:
            self.end(link, code, text)
            return
        self.deliver(link, encode(RefusedMessage(code, text)))
        if self._forget(link):
            self._refusals.refused(str(link.peer.public_key), link.peer.who, code, text)

    def end(self, link: Link, code: str, text: str, micro: int | None = None) -> None:
        """Tells the client why, then drops it. What it has sent meanwhile is passed over."""
        text = presentable(text, _TEXT_BYTES)
        if link.control_peer in self._links:
            self._send(link, encode(Fault(code, text, True, micro)))
        self.drop(link, f"{code}: {text}", lost=code == RefusalCode.SEAL)

    def drop(self, link: Link, reason: str, *, lost: bool = True) -> None:
        """Forgets a session without a word to its client. ``lost``: neither side has ended it."""
        if not self._forget(link):
            return
        if not link.attached:
            text = f"gone before its session was open: {reason}"
            # Apart from what is answered, as what is cut is.
            self._refusals.refused(str(link.peer.public_key), link.peer.who, "lost", text, kind="lost")
            return
        try:
            self._handler.on_closed(link.id, reason, lost=lost)
        except Exception:
            _log.exception("on_closed failed")

    def _forget(self, link: Link) -> bool:
        with self.lock:
            known = self._links.pop(link.control_peer, None) is not None
            self._sessions.pop(link.id, None)
        self.active.pop(link, None)
        if known:
            self._leaving.add(Endpoint.CONTROL, link.control_peer)
        if known and link.data_peer is not None:
            self._leaving.add(Endpoint.DATA, link.data_peer)
        return known

    def cut(self, endpoint: Endpoint, peer: bytes | None) -> None:
        """The transport has cut a connection whose peer sent a message without an end; or, None, all of an endpoint because of
        several such.
        """
        for link in list(self._links.values()):
            if peer is None and (endpoint is Endpoint.CONTROL or link.data_peer is not None):
                self._send(link, encode(Closing("a flood of other clients", True)))
                self.drop(link, f"a flood on the {endpoint.value} endpoint, which was opened anew")
            elif peer and peer == (link.control_peer if endpoint is Endpoint.CONTROL else link.data_peer):
                self.end(link, RefusalCode.PROTOCOL, f"a message without an end on the {endpoint.value} endpoint")

    def close_all(self, text: str, *, back: bool) -> None:
        """Tells everybody Closing; ``back``: the server means to be back."""
        text = presentable(text, _TEXT_BYTES)
        for link in list(self._links.values()):
            self._send(link, encode(Closing(text, back)))
            self.drop(link, text, lost=False)

    def tick(self) -> None:
        """What time brings: heartbeats, silence, handshakes that take too long, keys that were taken off the list."""
        now = self._clock()
        self._admission.expire()
        self._leaving.tick()
        edited = self._admission.changed()
        for link in list(self._links.values()):
            self.guard(link, link.tally.check_doubt, now, self._timing.silence)
            limits = self._admission.limits(link.peer) if edited else None
            if limits is not None:
                link.allowance.limit(limits)
            if edited and limits is None:
                self.end(link, RefusalCode.NOT_AUTHORIZED, REMOVED)
            elif now - link.heard >= self._timing.silence:
                self.drop(link, f"silent for {self._timing.silence:g} s")
            elif (link.outbox or link.stuck) and link.attached and now - link.moved >= self._timing.stall:
                self.drop(link, f"it has read nothing for {self._timing.stall:g} s of what was sent to it")
            elif not link.attached and now >= link.deadline:
                self.end(link, RefusalCode.STALE, "the session was not opened in time")
            elif link.hello is not None and link.goodbye is None and now - link.beat >= self._timing.heartbeat:
                link.beat = now
                self.tell(link, Heartbeat(time.time(), link.told, link.records_sent))
