"""Rows survive every kind of file, with the line they start in; what is wrong with a file is said with its place."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from minift.data.rows import BadRows, RowError, read_rows

texts = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(["\u2028", "\x85", "]", "},{", "\\", "[1]"])
rows_strategy = st.lists(st.fixed_dictionaries({"a": texts, "b": st.lists(texts, max_size=2)}), min_size=1, max_size=6)


def read(content: bytes, policy: str = "error", name: str = "rows.json"):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        bad_rows = BadRows(policy)
        return [(row.fields, row.line) for row in read_rows(path, bad_rows)], bad_rows


@settings(max_examples=40, deadline=None)
@given(rows=rows_strategy, data=st.data(), ascii=st.booleans(), mark=st.booleans())
def test_json_lines_and_array(rows, data, ascii, mark):
    """Blank lines, indentation, a byte order mark and escapes in any mixture; the line is counted as text is built."""
    space = st.text(" \t\n\r", max_size=3)
    for array in (False, True):
        text, expected = "[" if array else "", []
        for i, row in enumerate(rows):
            text += data.draw(space)
            expected.append((row, text.count("\n") + 1))
            indent = data.draw(st.none() | st.integers(0, 2)) if array else None
            text += json.dumps(row, ensure_ascii=ascii, indent=indent)
            text += data.draw(space) + ("," if i + 1 < len(rows) else "]") if array else "\n"
        content = (b"\xef\xbb\xbf" if mark else b"") + text.encode()
        assert read(content)[0] == expected


@settings(max_examples=15, deadline=None)
@given(rows=rows_strategy)
def test_parquet(rows):
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink, row_group_size=2)
    assert read(sink.getvalue().to_pybytes())[0] == [(row, i + 1) for i, row in enumerate(rows)]


BAD_LINES = b'{"a": 1}\n{"a": \n\n[1]\n"x"\n{"a": 2}'


def test_bad_rows_are_refused_or_counted():
    with pytest.raises(RowError, match=r"json:2: not valid JSON \(Expecting value at column 6\); valid: one object"):
        read(BAD_LINES)
    rows, bad_rows = read(BAD_LINES, "skip")
    assert rows == [({"a": 1}, 1), ({"a": 2}, 6)]
    assert bad_rows.count == 3
    assert [example.split("rows.json")[1] for example in bad_rows.examples[1:]] == [
        ":4: a row must be a JSON object {...}, this is a list",
        ":5: a row must be a JSON object {...}, this is text",
    ]
    _, many = read(b"1\n" * 20, "skip")
    assert many.count == 20 and len(many.examples) == BadRows.NUM_EXAMPLES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b" \n\n ", "the file is empty"),
        (b'[{"a": 1},\n {"a": 2}', r"rows.json:2: not valid JSON \(Expecting ',' or '\]' at column 10\)"),
        (b'[{"a": 1} {"a": 2}]', "Expecting ',' or ']' at column 11"),
        (b"[", "Expecting value"),
        (b"[{}] {}", "Text after the end of the array at column 6"),
        (b'{"a": "\xff"}', "not UTF-8 text"),
        (b'[{"a": "\xff"}]', "not UTF-8 text .byte 8"),
        (b"PAR1 and then nothing", "not a readable Parquet file"),
    ],
)
def test_broken_files_are_refused_under_any_policy(content, message):
    for policy in ("error", "skip"):
        with pytest.raises(ValueError, match=message.replace("',' or ']'", r"',' or '\]'")):
            read(content, policy)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="nowhere.json: no such file"):
        list(read_rows(tmp_path / "nowhere.json", BadRows("skip")))
    with pytest.raises(ValueError, match="not a file"):
        list(read_rows(tmp_path, BadRows("skip")))
