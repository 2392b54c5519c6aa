"""Run a function on n gloo processes that are started once and shared by all tests.

With MINIFT_TEST_DEVICE=cuda they all compute on the first GPU.

`run_ranks(n, fn, *args)` calls `fn(world, *args)` on ranks 0 … n - 1 of a pool of MAX_RANKS processes and returns the
list of results; an exception on any rank is raised here with that rank's traceback. Starting a process costs seconds
(importing torch), a call costs milliseconds, so hypothesis can afford hundreds of examples.

`fn` must be a top-level function of an importable module (it travels by name), its arguments and result picklable.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch

DEVICE = torch.device("cuda", 0) if os.environ.get("MINIFT_TEST_DEVICE") == "cuda" else torch.device("cpu")
"""Where ranks compute."""

MAX_RANKS = 4
TIMEOUT_S = 120

_pool: list[tuple[Any, Connection]] = []


def run_ranks(n: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """Results of `fn(world, *args)` on each of n ranks, in rank order."""
    assert 1 <= n <= MAX_RANKS
    if not _pool:
        _start_pool()
    for _, pipe in _pool[:n]:
        pipe.send((n, fn, args))
    results, failures = [], []
    for rank, (process, pipe) in enumerate(_pool[:n]):
        if not pipe.poll(TIMEOUT_S):
            failures.append(f"rank {rank}: no answer in {TIMEOUT_S} s (alive: {process.is_alive()})")
            continue
        try:
            ok, result = pipe.recv()
        except (EOFError, OSError):
            failures.append(f"rank {rank} died (exit code {process.exitcode})")
            continue
        if ok:
            results.append(result)
        else:
            failures.append(f"rank {rank}:\n{result}")
    if failures:
        _stop_pool()  # ranks may be stuck inside a collective: the next call starts afresh
        raise RuntimeError("\n".join(failures))
    return results


def restart() -> None:
    """The next call starts processes without a past, which would show in what memory is resident."""
    _stop_pool()


def _start_pool() -> None:
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for rank in range(MAX_RANKS):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(rank, port, theirs), daemon=True)
        process.start()
        theirs.close()
        _pool.append((process, ours))
    atexit.register(_stop_pool)


def _stop_pool() -> None:
    for process, pipe in _pool:
        pipe.close()
        process.kill()
    _pool.clear()


def _serve(rank: int, port: int, pipe: Connection) -> None:
    import torch.distributed as dist

    from minift.dist.process import World

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=MAX_RANKS, timeout=timedelta(seconds=60)
    )
    groups = []
    for n in range(1, MAX_RANKS + 1):
        groups.append(dist.new_group(list(range(n))))
        for outsider in range(n, MAX_RANKS):  # torch names later groups by how many a rank is in: keep that equal
            dist.new_group([outsider])
    while True:
        try:
            n, fn, args = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            world = World(rank, n, rank, DEVICE, "gloo", groups[n - 1])
            pipe.send((True, fn(world, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
