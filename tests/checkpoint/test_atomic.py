"""All or nothing, whenever the process is killed."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
from safetensors import SafetensorError

from minift.checkpoint.atomic import atomic_folder, swap_in
from tests.checkpoint.kills import all_kills


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


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_with_the_folder(tmp_path, number):
    """What was asked for, and not the temporary one, whether or not the writer knew its file."""
    for path in (), (str(tmp_path / ".out.1.tmp" / "file"),):
        with pytest.raises(OSError) as told, atomic_folder(tmp_path / "out"):
            raise OSError(number, os.strerror(number), *path)
        assert (told.value.errno, told.value.filename) == (number, str(tmp_path / "out"))
    with pytest.raises(OSError, match="/out cannot be written: .*os error 28"), atomic_folder(tmp_path / "out"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read_keeps_its_name(tmp_path):
    with pytest.raises(OSError) as told, atomic_folder(tmp_path / "out"):
        (tmp_path / "base").read_text()
    assert str(told.value.filename) == str(tmp_path / "base")


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


def test_what_killed_processes_left_goes_away_and_nothing_else(tmp_path):
    finished = subprocess.Popen(["true"])
    finished.wait()
    ours, theirs = f".out.{finished.pid}.tmp", f".out.more.{finished.pid}.tmp"
    alive = f".out.{os.getppid()}.tmp"
    for name in (ours, theirs, alive, f".out.{os.getpid()}.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    with atomic_folder(tmp_path / "out") as temporary:
        assert list(temporary.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"out", theirs, alive}


FILES = ("a", "b", "c")


def fill(folder: Path, content: str) -> None:
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text(content)


def content(folder: Path) -> str:
    """Of all its files; empty if there is no such folder."""
    if not folder.exists():
        return ""
    (only,) = {(folder / name).read_text() for name in FILES}
    return only


def test_a_swap_that_is_killed_anywhere_loses_nothing_and_can_be_ended(tmp_path):
    fresh, folder = Path(), Path()

    def prepare() -> tuple[Path, Path]:
        nonlocal fresh, folder
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        place.mkdir()
        fresh, folder = place / ".it.new", place / "it"
        fill(folder, "old")
        fill(fresh, "new")
        return fresh, folder

    seen = []
    for _ in all_kills(swap_in, prepare):
        seen.append((content(fresh), content(folder)))  # never a part of one
        swap_in(fresh, folder)
        assert content(folder) == "new" and [path.name for path in folder.parent.iterdir()] == ["it"]
    assert content(folder) == "new" and [path.name for path in folder.parent.iterdir()] == ["it"]
    renames = [("new", "old"), ("new", ""), ("", "new")]  # before the first, before the second, in the removal
    assert list(dict.fromkeys(seen)) == renames and len(seen) == 2 + len(FILES) + 1


def test_a_swap_that_was_killed_twice(tmp_path):
    """Killed between the renames; and again in what the second one clears up first."""
    fill(tmp_path / ".it.new", "new")
    fill(tmp_path / ".it.old", "old")
    (tmp_path / ".it.old" / "a").unlink()
    swap_in(tmp_path / ".it.new", tmp_path / "it")
    assert content(tmp_path / "it") == "new" and [path.name for path in tmp_path.iterdir()] == ["it"]


def test_a_swap_without_anything_new_changes_nothing(tmp_path):
    fill(tmp_path / "it", "old")
    swap_in(tmp_path / ".it.new", tmp_path / "it")
    assert content(tmp_path / "it") == "old" and [path.name for path in tmp_path.iterdir()] == ["it"]
