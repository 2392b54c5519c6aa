"""A folder that is either complete under its name or not there: written beside it, flushed to disk, renamed.

`kill -9` at any moment leaves nothing worse than folders with a dot before their names, which the next one to write
there removes (`atomic_folder`) or puts in its place (`swap_in`).
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that only writing meets, and that name no file where one is open already."""


def refuse_occupied(folder: Path) -> None:
    """ValueError if `folder` is a file or holds something: nothing is overwritten."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; give a new folder, or remove it first")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder on the same disk; when the block ends it becomes `folder`, when it raises it is removed.

    ValueError as of `refuse_occupied`; OSError with the name of `folder` if the disk has no room.
    """
    refuse_occupied(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            flush(path)
        flush(temporary)
        temporary.rename(folder)
        flush(folder.parent)  # the rename itself
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from error
    except SafetensorError as error:  # what that library makes of an OSError
        raise OSError(f"{folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def swap_in(fresh: Path, folder: Path) -> None:
    """Give the complete folder `fresh` the name `folder`, in the same place; what had that name before goes away.

    At every moment one of the two names is that of a complete folder, and neither that of half of one. If a kill comes
    between, calling this again ends the work; without a `fresh` it only clears up.
    """
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # never wanted again: while nothing has the name, `fresh` is there
    if not fresh.is_dir():
        return
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """fsync of a file's bytes, or of a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear_leftovers(folder: Path) -> None:
    """Remove the temporary folders of processes that were killed.

    One that lives may be writing there, by mistake, and must not get our files among its own; it has another number. A
    process of another machine on the same disk looks dead from here: it fails when it finds its folder gone.
    """
    prefix, suffix = f".{folder.name}.", ".tmp"
    for path in folder.parent.iterdir():
        pid = path.name.removeprefix(prefix).removesuffix(suffix)
        if path.name == f"{prefix}{pid}{suffix}" and pid.isdecimal() and not _is_another(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _is_another(pid: int) -> bool:
    """Whether a process other than this one has that number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid != os.getpid()
