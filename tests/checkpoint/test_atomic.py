"""All or nothing."""

from __future__ import annotations

import pytest

from minift.checkpoint.atomic import atomic_folder


def test_appears_when_complete_and_only_then(tmp_path):
    with atomic_folder(tmp_path / "deep" / "out") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out" / "sub" / "file").read_text() == "x"


def test_leaves_nothing_after_an_error(tmp_path):
    with pytest.raises(OSError, match="disk full"), atomic_folder(tmp_path / "out") as temporary:
        (temporary / "file").write_text("x")
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_overwrites_nothing(tmp_path):
    (tmp_path / "file").write_text("precious")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="exists already"), atomic_folder(taken):
            pass
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as temporary:
        (temporary / "file").touch()
    assert (tmp_path / "empty" / "file").exists()
    assert (tmp_path / "file").read_text() == "precious"
