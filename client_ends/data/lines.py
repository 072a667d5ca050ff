"""Lines and records of a file, one at a time, each with its line number for the message when something is wrong.

Files are read as bytes and decoded line by line: so a bad byte is found in its line, and a large file is read once.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from splitfl.errors import DataError


def bad_row(path: Path, line: int, what: str) -> DataError:
    """The one form in which a row is complained about: file, line, what is wrong and the mend."""
    return DataError(f"{path}, line {line}: {what}")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """``(line number from 1, text without its end)``. Raises ``DataError``: no file, not UTF-8, a NUL character."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if number == 1:
                    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                        raise bad_row(path, 1, "this is UTF-16; save the file as UTF-8.")
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if b"\x00" in raw:
                    raise bad_row(path, number, "it holds a NUL character, so this is no text; remove it from the file.")
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise bad_row(path, number, f"byte {error.start + 1} is not UTF-8; save the file as UTF-8.") from None
                yield number, text.removesuffix("\n").removesuffix("\r")
    except FileNotFoundError:
        raise DataError(f"There is no file {path}: check the path.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; name a readable file.") from None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """One JSON object a line; blank lines are skipped."""
    for number, text in read_lines(path):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            where = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise bad_row(path, number, f"not JSON ({where}); each line has to be one JSON object.") from None
        if not isinstance(row, dict):
            raise bad_row(path, number, 'a JSON value that is no object; each line has to be like {"text": "..."}.')
        yield number, row


def read_tsv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Tab-separated with a header line. Quotes are plain characters, as in the files of GLUE."""
    rows = ((number, text.split("\t")) for number, text in read_lines(path) if text.strip())
    return _with_header(path, rows)


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Comma-separated with a header line, quoted as RFC 4180 says: a quoted field may hold commas and line ends."""
    reader = csv.reader((text + "\n" for _, text in read_lines(path)), strict=True)

    def rows() -> Iterator[tuple[int, list[str]]]:
        while True:
            start = reader.line_num + 1  # a quoted record may take several lines: name its first
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise bad_row(path, start, f"not CSV ({error}); quote the field and double the quotes in it.") from None
            if fields and any(field.strip() for field in fields):
                yield start, fields

    return _with_header(path, rows())


def _with_header(path: Path, rows: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, dict[str, Any]]]:
    header: list[str] | None = None
    for number, fields in rows:
        if header is None:
            header = [name.strip() for name in fields]
            if len(set(header)) != len(header) or not all(header):
                raise bad_row(path, number, f"the header {header} has empty or repeated names; give each column its own.")
        elif len(fields) != len(header):
            raise bad_row(path, number, f"{len(fields)} fields where the header has {len(header)}; add or remove separators.")
        else:
            yield number, dict(zip(header, fields, strict=True))
