"""Oracle: json itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minift.json_file import read_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(VALUES)
def test_objects_are_read_and_nothing_else(tmp_path: Path, value: object) -> None:
    path = tmp_path / "some.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    if isinstance(value, dict):
        assert read_object(path) == value
    else:
        with pytest.raises(ValueError, match=r"some\.json is not a JSON object"):
            read_object(path)


@pytest.mark.parametrize("content", [b"", b'{"half": ', b"\xff\xfe{}", b"version https://git-lfs.github.com/spec/v1\n"])
def test_what_is_not_json_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"some\.json is not JSON: "):
        read_object(path)
