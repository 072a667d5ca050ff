"""The common ground of all messages: a frozen dataclass whose fields are checked whenever one is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from splitfl.errors import LocalProtocolError
from splitfl.protocol.fields import Check, FieldError

PROTOCOL_VERSION = 3

# One frame on the control endpoint, and the metadata of one data message.
MAX_CONTROL_BYTES = 64 * 1024
MAX_METADATA_BYTES = 64 * 1024
# A Hello, in every version of the protocol: whoever sends one has no session yet.
MAX_HELLO_BYTES = 8 * 1024


@dataclass(frozen=True)
class Message:
    """A message that exists is valid: making one with a wrong field raises :class:`LocalProtocolError`."""

    TYPE: ClassVar[int]
    FIELDS: ClassVar[Mapping[str, Check]]

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """A message of exactly its fields, none left out. As the constructor, but cheaper: that of a frozen dataclass sets each
        attribute by a call.
        """
        message = object.__new__(cls)
        message.__dict__.update(fields)
        message.__post_init__()
        return message

    def __post_init__(self) -> None:
        values, name = self.__dict__, ""
        try:
            for name, check in self.FIELDS.items():
                values[name] = check(values[name])  # not by setattr, which a frozen dataclass has none of
        except FieldError as error:
            raise LocalProtocolError(f"{type(self).__name__}.{name} {error}") from None
        self.check()

    def check(self) -> None:
        """What one field alone cannot tell. Raises LocalProtocolError."""

    def to_map(self) -> dict[str, Any]:
        """What is encoded: the type number and every field."""
        values = self.__dict__
        return {"type": self.TYPE, **{name: values[name] for name in self.FIELDS}}
