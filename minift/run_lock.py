"""One run at a time in a run folder: two would write over each other's metrics and remove each other's checkpoints.

The lock is the operating system's (flock), held by rank 0 and gone with its process, however that ends: an elastic
restart goes on at once, and a rank 0 that outlived its torchrun is noticed. A disk that is shared over a network may
have no such locks, or keep them to one machine, and then nothing guards the folder; or keep that of a machine that was
lost for a while. Reading a run folder takes no lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold `run_dir`, which is made if need be, while the block runs. ValueError if another process does."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"run_dir is {run_dir}, where {file.read() or 'another process'} is training; wait until it ends, stop "
                "it (also if its torchrun is gone), or give another --run_dir"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
