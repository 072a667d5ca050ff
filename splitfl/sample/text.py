"""Real English that every CPython carries: the topics of its own documentation (``help("topics")``)."""

from __future__ import annotations

import os
import re
from pathlib import Path

from splitfl.errors import DataError

# Runs of spaces, underlines and tables are layout, not language.
_SPACES = re.compile(r"(?<=\S) {2,}")
_LAYOUT = re.compile(r"^ *(?:[*=\-~^]{3,}|[|+].*)$\n?", re.MULTILINE)


def sample_text() -> str:
    """About 400 thousand characters of English, with some Python code; ``DataError`` where Python left them out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError("This Python carries no documentation topics (pydoc_data): give a text file instead.") from None
    pieces = (_LAYOUT.sub("", _SPACES.sub(" ", topics[name])).strip() for name in sorted(topics))
    return "\n\n".join(piece for piece in pieces if piece) + "\n"


def write_sample_shards(out_dir: str | os.PathLike[str], clients: int = 3, *, characters: int | None = None) -> list[Path]:
    """Split the sample text (its first ``characters``) into one file a client, of unequal size, 1 : 2 : 3 and so on.

    Returns the files, ``client-0.txt`` and on. Cuts fall between lines, so the files joined are the text.
    """
    if clients < 1:
        raise DataError(f"The sample text is split among 1 client or more, not {clients}.")
    text = sample_text()[:characters]
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    whole = clients * (clients + 1) // 2
    files, begin = [], 0
    for client in range(clients):
        reached = len(text) * (client + 1) * (client + 2) // 2 // whole
        end = len(text) if client == clients - 1 else text.find("\n", reached) + 1
        end = end or len(text)
        if not text[begin:end].strip():
            raise DataError(f"The sample text is too short for {clients} clients: take fewer clients or more characters.")
        file = out / f"client-{client}.txt"
        # newline="": the same bytes on every system.
        file.write_text(text[begin:end], encoding="utf-8", newline="")
        files.append(file)
        begin = end
    return files
