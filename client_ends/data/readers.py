"""Data files to examples of one kind: text, completion, chat or classification."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from client_ends.data.lines import bad_row, read_csv, read_jsonl, read_lines, read_tsv
from splitfl.errors import ConfigError, DataError

Kind = Literal["text", "completion", "chat", "classification"]

#: The fields of each kind, in the order in which a row's kind is decided. ``text_pair`` may join a classification row.
FIELDS: dict[Kind, tuple[str, ...]] = {
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "classification": ("text", "label"),
    "text": ("text",),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {"classification": ("text_pair",)}
_KNOWN = ("text", "text_pair", "label", "prompt", "completion", "messages")

_READERS: dict[str, Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]] = {
    "jsonl": read_jsonl,
    "csv": read_csv,
    "tsv": read_tsv,
}
# A running text is kept in pieces of about this many characters, cut between lines.
_PIECE = 1 << 22


@dataclass(frozen=True)
class Examples:
    """Rows of one kind. ``rows[i]`` has the fields of its kind and came from line ``lines[i]`` of ``path``.

    ``running``: the rows are pieces of one running text (a txt file), to be cut into blocks, rather than documents.
    """

    kind: Kind
    rows: list[dict[str, Any]]
    path: Path
    lines: list[int] = field(repr=False)
    running: bool = False

    def __len__(self) -> int:
        return len(self.rows)


def load_examples(path: str | Path, *, columns: Mapping[str, str] | None = None, format: str | None = None) -> Examples:
    """Read a data file.

    ``format`` is ``txt``, ``jsonl``, ``csv`` or ``tsv``; without it the file's extension says. ``columns`` maps the
    field to the file's own column (``{"prompt": "question", "completion": "answer"}``); with it, only what it maps is
    read. Without it the fields are found by name: ``messages``; ``prompt`` and ``completion``; ``text`` and
    ``label``; ``text``.

    Raises ``DataError`` naming file and line where a row is bad, ``ConfigError`` for an unusable format or mapping.
    """
    path = Path(path)
    chosen = (format or path.suffix.removeprefix(".")).lower()
    if chosen == "txt":
        if columns:
            raise ConfigError("A txt file has no columns: leave the column mapping out.")
        return _running_text(path)
    if chosen not in _READERS:
        raise ConfigError(f"The format of {path} is not known: give it as txt, jsonl, csv or tsv.")
    if columns:
        _check_columns(columns)
    kind: Kind | None = None
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, raw in _READERS[chosen](path):
        if kind is None:
            mapping = dict(columns) if columns else {name: name for name in _KNOWN if name in raw}
            kind = _kind_of(path, raw, mapping, explicit=bool(columns))
            wanted = {name: mapping[name] for name in (*FIELDS[kind], *_OPTIONAL.get(kind, ())) if name in mapping}
        rows.append(_row(path, number, raw, wanted, kind))
        lines.append(number)
    if kind is None:
        raise DataError(f"{path} holds no rows: give a file with at least one.")
    return Examples(kind, rows, path, lines)


def _running_text(path: Path) -> Examples:
    rows, lines = [], []
    piece: list[str] = []
    size, first = 0, 1
    for number, text in read_lines(path):
        piece.append(text)
        size += len(text) + 1
        if size >= _PIECE:
            rows.append({"text": "\n".join(piece) + "\n"})
            lines.append(first)
            piece, size, first = [], 0, number + 1
    if piece:
        rows.append({"text": "\n".join(piece) + "\n"})
        lines.append(first)
    if not any(row["text"].strip() for row in rows):
        raise DataError(f"{path} holds no text: give a file with some.")
    return Examples("text", rows, path, lines, running=True)


def _check_columns(columns: Mapping[str, str]) -> None:
    for name in columns:
        if name not in _KNOWN:
            raise ConfigError(f"Columns can be mapped to {', '.join(_KNOWN)}, not to {name!r}.")
    for kind, fields in FIELDS.items():
        if set(fields) <= set(columns) <= {*fields, *_OPTIONAL.get(kind, ())}:
            return
    raise ConfigError(
        f"A mapping of {' and '.join(sorted(columns))} is no kind of data: map prompt and completion, text and label "
        "(and text_pair), messages alone, or text alone."
    )


def _kind_of(path: Path, raw: dict[str, Any], mapping: dict[str, str], *, explicit: bool) -> Kind:
    missing = [column for column in mapping.values() if column not in raw]
    if missing:
        raise DataError(f"{path} has no column {missing[0]!r}: it has {', '.join(map(repr, raw))}; mend the mapping.")
    for kind, fields in FIELDS.items():
        if set(fields) <= mapping.keys():
            return kind
    assert not explicit
    raise DataError(
        f"{path} has the columns {', '.join(map(repr, raw))}, none of them text, prompt and completion, or messages: "
        "map them, for example prompt=question,completion=answer."
    )


def _row(path: Path, number: int, raw: dict[str, Any], wanted: dict[str, str], kind: Kind) -> dict[str, Any]:
    row = {}
    for name, column in wanted.items():
        if column not in raw:
            raise bad_row(path, number, f"no {column!r}, which the rows before have; add it or remove the row.")
        value = raw[column]
        if name == "messages":
            _check_messages(path, number, value)
        elif name == "label":
            if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
                raise bad_row(path, number, f"the label {value!r} is neither a whole number nor a name; mend it.")
        elif not isinstance(value, str):
            kind_of_value = "null" if value is None else type(value).__name__
            raise bad_row(path, number, f"{column!r} is no text but {kind_of_value}; write it as a string.")
        elif name in ("text", "completion") and not value.strip():
            raise bad_row(path, number, f"{column!r} is empty; fill it or remove the row.")
        else:
            _check_characters(path, number, value)
        row[name] = value
    return row


def _check_characters(path: Path, number: int, value: str) -> None:
    # JSON's escapes can write what no UTF-8 file may hold.
    if "\x00" in value:
        raise bad_row(path, number, "it holds a NUL character, so this is no text; remove it.")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise bad_row(path, number, "it holds half of a surrogate pair, which is no character; remove it.")


def _check_messages(path: Path, number: int, messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise bad_row(path, number, "the messages are no list of turns; write a list of {role, content}.")
    for turn in messages:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
            raise bad_row(path, number, 'a turn without role and content as text; write {"role": ..., "content": ...}.')
        _check_characters(path, number, turn["content"])
