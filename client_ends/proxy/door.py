"""Who is let in: whoever has the key, and on loopback no web page that has talked its way there."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from urllib.parse import urlsplit

from client_ends.proxy.problems import ApiError

__all__ = ["Door", "is_loopback"]


def is_loopback(host: str) -> bool:
    """Whether a host, as a name or an address, can only be this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class Door:
    """``key``: what requests must show (None: nothing). ``local``: the port is on loopback, so only names of this machine lead
    to it: a page of another name whose address has been changed to this one (DNS rebinding) is turned away.
    """

    def __init__(self, key: str | None, *, local: bool) -> None:
        self._digest = None if key is None else _digest(key)
        self._local = local

    def check_host(self, host: str | None) -> None:
        """The Host header. Raises ApiError."""
        if self._local and not (host and is_loopback(_name_of(host))):
            raise ApiError(403, "this endpoint answers to localhost and loopback addresses only", code="host_not_allowed")

    def check_key(self, authorization: str | None) -> None:
        """The Authorization header. Raises ApiError."""
        if self._digest is None:
            return
        scheme, _, shown = (authorization or "").partition(" ")
        # Digests, so that the time says nothing of the key's length either.
        if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(shown.strip()), self._digest):
            raise ApiError(401, "wrong or missing key: send Authorization: Bearer KEY", code="invalid_api_key")

    def check_content_type(self, content_type: str) -> None:
        """Raises ApiError: a web page may send other types to anywhere without being asked whether it may."""
        if content_type != "application/json":
            raise ApiError(415, "send the body as Content-Type: application/json", code="wrong_content_type")


def _name_of(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
