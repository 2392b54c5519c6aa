"""One run at a time in a folder. Oracle: real processes, which hold it, end, or are killed."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from minift.run_lock import run_lock

HOLDER = """
import sys
from pathlib import Path
from minift.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("has it", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "has it\n"
        yield process
        process.kill()


def test_a_second_process_is_told_who_has_it(tmp_path: Path, holder: subprocess.Popen) -> None:
    for _ in range(2):  # to be refused changes nothing
        with pytest.raises(ValueError, match=rf"run_dir is .*, where process {holder.pid} on \S+ is training; wait"):
            with run_lock(tmp_path):
                raise AssertionError("two have it")


@pytest.mark.parametrize("is_killed", [False, True])
def test_it_ends_with_its_process(tmp_path: Path, holder: subprocess.Popen, is_killed: bool) -> None:
    if is_killed:
        holder.kill()
    holder.communicate()
    with run_lock(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()


def test_it_ends_with_its_block(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), run_lock(folder):
            raise KeyboardInterrupt
    assert (folder / ".lock").read_text().count("process") == 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO])
def test_disks_without_locks_are_not_guarded_and_other_errors_are_told(
    tmp_path: Path, monkeypatch, number: int
) -> None:
    def flock(file, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output") if number == errno.EIO else nullcontext(), run_lock(tmp_path):
        pass
