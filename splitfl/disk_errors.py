"""What the system says of files that it will not write or read, as one sentence with the mend."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from splitfl.errors import CheckpointError, NotReadable, NotWritten

__all__ = ["said_if_unreadable", "said_if_unwritable"]

#: What was written is not to be had any more, now or later: the disk has lost it, or the file system is broken there.
_LOST = {errno.EIO, errno.EBADMSG, errno.ENOENT, getattr(errno, "EUCLEAN", errno.EIO)}


@contextmanager
def said_if_unwritable(what: str) -> Iterator[None]:
    """Raises ``NotWritten`` where the system refuses to write; ``what`` begins the sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors has an error of its own, with the system's in its text.
        found = re.search(r"os error (\d+)", str(error))
        code = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        why = os.strerror(code) if code else str(error)
        raise NotWritten(f"{what} cannot be written ({why}): make room or mend the disk, then go on with --resume.") from error


@contextmanager
def said_if_unreadable(what: str) -> Iterator[None]:
    """Raises ``CheckpointError`` where the disk has lost what it held, ``NotReadable`` where the system refuses to read for
    another reason, which may pass or be mended; ``what`` begins the sentence.
    """
    try:
        yield
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in _LOST:
            raise CheckpointError(f"{what} is damaged, the disk does not give it back ({why}): use another one.") from error
        raise NotReadable(f"{what} cannot be read ({why}): mend that, then go on with --resume.") from error
