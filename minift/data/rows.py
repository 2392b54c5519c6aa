"""Files of rows: JSON array, JSON lines or Parquet -> `Row(fields, file, line)`, one at a time.

The kind is told by the first bytes, because names lie: many `.json` files hold JSON lines. Whatever is wrong with a row
is a `RowError` that names the file, the line and the reason; `BadRows` decides whether the first of them ends the run
or all of them are counted. What is wrong with a file as a whole always ends the run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from minift.data.config import BadRowPolicy

WHITESPACE = re.compile(r"[ \t\n\r]*")


class Row(NamedTuple):
    """One row. `line`: where it starts in the file, from 1; in Parquet the number of the row, from 1."""

    fields: dict[str, Any]
    file: str
    line: int


class RowError(ValueError):
    """A row that cannot be used."""

    def __init__(self, file: str, line: int, reason: str) -> None:
        super().__init__(f"{file}:{line}: {reason}")


class BadRows:
    """Takes note of bad rows: under "error" raises the first one, under "skip" counts, and keeps a few as examples."""

    NUM_EXAMPLES = 5

    def __init__(self, policy: BadRowPolicy) -> None:
        self.policy = policy
        self.count = 0
        self.examples: list[str] = []

    def add(self, error: RowError) -> None:
        if self.policy == "error":
            raise error
        self.count += 1
        if len(self.examples) < self.NUM_EXAMPLES:
            self.examples.append(str(error))


def read_rows(path: str | Path, bad_rows: BadRows) -> Iterator[Row]:
    """The rows of a file in order. Raises ValueError for a file that is missing, empty, or of no known kind."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
    with path.open("rb") as file:
        start = file.read(4096)
    if start.startswith(b"PAR1"):
        values = _parquet(path)
    else:
        text = start.removeprefix(b"\xef\xbb\xbf").lstrip()  # some editors write a byte order mark
        if not text and path.stat().st_size <= len(start):
            raise ValueError(f"{path}: the file is empty; valid: a JSON array, JSON lines or Parquet")
        values = _json_array(path) if text.startswith(b"[") else _json_lines(path)
    for value, line in values:
        if isinstance(value, dict):
            yield Row(value, str(path), line)
        elif isinstance(value, json.JSONDecodeError):
            reason = f"not valid JSON ({value.msg} at column {value.colno}); valid: one object per line, or one array"
            bad_rows.add(RowError(str(path), line, reason))
        else:
            bad_rows.add(RowError(str(path), line, f"a row must be a JSON object {{...}}, this is {kind(value)}"))


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    words = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return words.get(type(value), "a number")


def _json_lines(path: Path) -> Iterator[tuple[Any, int]]:
    """One value per line that is not blank; a JSONDecodeError stands for a line that is no JSON."""
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:  # newline: U+2028 or \r inside a line end nothing
            for line, text in enumerate(file, start=1):
                if text.strip():
                    yield _parsed(text.rstrip()), line
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{line + 1}: not UTF-8 text ({error.reason}, here or soon after)") from error


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return error


def _json_array(path: Path) -> Iterator[tuple[Any, int]]:
    """The elements of one array, one by one. Broken syntax leaves no way to find the next element, and is an error."""
    try:
        text = path.read_bytes().decode("utf-8-sig")  # as it is: read_text would turn a lone \r into a line
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}: {error.reason})") from error
    decoder = json.JSONDecoder()
    position = WHITESPACE.match(text, text.index("[") + 1).end()
    counted, line = 0, 1
    try:
        while not text.startswith("]", position):
            line, counted = line + text.count("\n", counted, position), position
            value, position = decoder.raw_decode(text, position)
            yield value, line
            position = WHITESPACE.match(text, position).end()
            if text.startswith(",", position):
                position = WHITESPACE.match(text, position + 1).end()
            elif not text.startswith("]", position):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        rest = WHITESPACE.match(text, position + 1).end()
        if rest != len(text):
            raise json.JSONDecodeError("Text after the end of the array", text, rest)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from error


def _parquet(path: Path) -> Iterator[tuple[Any, int]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading Parquet needs the package pyarrow (pip install pyarrow)") from error
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for value in batch.to_pylist():
                    number += 1
                    yield value, number
    except (ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from error

