"""What the server's I/O thread keeps of one client."""

from __future__ import annotations

from dataclasses import dataclass, field

from splitfl.channel.allowance import Allowance
from splitfl.channel.handler import Peer
from splitfl.channel.tally import Tally
from splitfl.protocol.assembly import Inbox, Outbox
from splitfl.protocol.ciphers import Buffer
from splitfl.protocol.credit import CreditAccount
from splitfl.protocol.messages import Hello, Open
from splitfl.protocol.session import ServerSession


@dataclass(slots=True)
class Traffic:
    """Bytes of frames of one client, over all its sessions."""

    received: int = 0
    sent: int = 0


@dataclass(eq=False)
class Link:
    """One client from its Hello on. Times are the channel's clock, seconds."""

    control_peer: bytes
    peer: Peer
    heard: float
    deadline: float  # for the handshake: to be attached by then
    tally: Tally
    allowance: Allowance
    beat: float = 0.0
    told: int = 0  # control frames sent
    records_sent: int = 0
    traffic: Traffic = field(default_factory=Traffic)
    session: ServerSession = field(default_factory=ServerSession)
    hello: Hello | None = None
    open: Open | None = field(default=None, repr=False)
    # From Opened on:
    id: str = ""
    account: CreditAccount | None = None
    max_message: int = 0  # the largest payload that the client may send
    credit_due: int = 0  # given back by the handler's owner, not yet told to the client
    outbox: Outbox | None = None
    inbox: Inbox | None = None
    # From the first data frame on:
    data_peer: bytes | None = None
    attached: bool = False
    left: bool = False  # the client has said Leave: it does not mean to come again
    goodbye: int | None = None  # the records that the client says it has sent, once it has said Bye
    moved: float = 0.0  # when a frame last left, or there was none to send
    stuck: Buffer | None = None  # a sealed frame the peer's pipe had no room for
