"""The sentences of a connection that failed; the same over every transport."""

from __future__ import annotations

from splitfl.errors import ConnectError, Refused
from splitfl.protocol.keys import PublicKey
from splitfl.protocol.messages import PROTOCOL_VERSION, RefusalCode


def nothing_listens(host: str, port: int, detail: str = "") -> ConnectError:
    """The port is closed, or the host cannot be reached."""
    because = f" ({detail})" if detail else ""
    return ConnectError(
        f"nothing listens at {host}:{port}{because}: check the address in the join string, and that the server runs"
    )


def other_key(host: str, port: int) -> ConnectError:
    """The CURVE handshake broke off before the server could judge our key."""
    return ConnectError(
        f"the server at {host}:{port} has another key than the join string says: ask the operator for the current join string "
        "(or, where many connections come from your address, try again in half a minute)"
    )


def not_splitfl(host: str, port: int) -> ConnectError:
    """Something answered, but not with a ZeroMQ CURVE greeting."""
    return ConnectError(f"what listens at {host}:{port} is not a splitfl server: check the port in the join string")


def silent(host: str, port: int, timeout: float) -> ConnectError:
    """The connection stands, no handshake came."""
    return ConnectError(
        f"{host}:{port} accepts connections but stayed silent for {timeout:g} s: "
        "the server hangs, or the port is another program's"
    )


def not_listed(key: PublicKey, name: str = "NAME") -> Refused:
    """The server knows us and says no."""
    return Refused(
        RefusalCode.NOT_AUTHORIZED,
        f"your key is not on the server's list: ask the operator to add this line to authorized_clients: {key} {name}",
    )


def data_unreachable(host: str, port: int, detail: str) -> ConnectError:
    """Control works, data does not."""
    return ConnectError(
        f"the server answers, but its data endpoint {host}:{port} does not ({detail}): "
        "the operator must open that port, or set --advertise to the address that clients can reach"
    )


def ticket_refused() -> Refused:
    """The data endpoint did not accept the ticket."""
    return Refused(
        RefusalCode.NOT_AUTHORIZED, "the data endpoint refused the session's ticket: it is used or too old, join again"
    )


def other_version(they: str, theirs: int, we: str) -> Refused:
    """The two sides speak different versions of the protocol."""
    return Refused(
        RefusalCode.PROTOCOL_VERSION,
        f"the {they} speaks protocol version {theirs}, the {we} {PROTOCOL_VERSION}: "
        "install the same splitfl version on both sides",
    )
