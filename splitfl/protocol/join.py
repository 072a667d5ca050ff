"""The join string: ``splitfl://KEY@host:port/RUN`` is all a client needs to find a server and know it for the right
one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from splitfl.errors import ConfigError, KeyFileError
from splitfl.protocol.keys import PublicKey

SCHEME = "splitfl://"
DEFAULT_RUN = "run"

_RUN = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}\Z")
_IPV6 = re.compile(r"[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9._-]{1,32})?\Z")


@dataclass(frozen=True)
class JoinString:
    """The server's public key, the address of its control endpoint (``host`` without brackets), and the run's name."""

    key: PublicKey
    host: str
    port: int
    run: str = DEFAULT_RUN

    def __post_init__(self) -> None:
        if ":" in self.host:
            if not _IPV6.match(self.host):
                raise ConfigError(f"the join string's host {self.host!r} is not an IPv6 address")
        elif not _HOST.match(self.host):
            raise ConfigError(f"the join string's host {self.host!r} is not a host name or address")
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"the join string's port {self.port} is not between 1 and 65535")
        if not _RUN.match(self.run):
            raise ConfigError(f"the run name {self.run!r} must have 1 to 64 letters, digits, dots, dashes or underscores")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{SCHEME}{self.key}@{host}:{self.port}/{self.run}"

    @classmethod
    def parse(cls, text: str) -> JoinString:
        """Reads a join string. Raises ConfigError with one sentence that says what is wrong with it."""
        text = text.strip()
        if not text.startswith(SCHEME):
            raise ConfigError(f"a join string begins with {SCHEME} (as the server prints it)")
        key_text, at, rest = text[len(SCHEME) :].partition("@")
        if not at:
            raise ConfigError("the join string has no @ between the server's key and its address")
        try:
            key = PublicKey.parse(key_text)
        except KeyFileError as error:
            raise ConfigError(f"the join string's key: {error}") from None
        address, _, run = rest.partition("/")
        run = run.rstrip("/")
        if "?" in run or "#" in run:
            raise ConfigError("the join string ends with the run's name: nothing may follow it")
        if address.startswith("["):
            host, bracket, tail = address[1:].partition("]")
            if not bracket:
                raise ConfigError("the join string's IPv6 address has no closing ]")
            port_text = tail[1:] if tail.startswith(":") else ""
        else:
            host, _, port_text = address.rpartition(":")
            if ":" in host:
                raise ConfigError("an IPv6 address in a join string stands in brackets: [::1]:port")
        if not host:
            raise ConfigError("the join string has no host:port after the @")
        if not port_text.isascii() or not port_text.isdigit() or len(port_text) > 5:
            raise ConfigError(f"the join string has no port number after the host {host!r}")
        return cls(key, host, int(port_text), run or DEFAULT_RUN)
