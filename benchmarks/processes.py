"""Processes that are measured from outside: started together in an environment of their own, their memory read by the
parent."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def spawn(
    target: Callable, num_ranks: int, job: Any, environment: dict[str, str]
) -> tuple[list, multiprocessing.Queue]:
    """`target(rank, job, results)` in a process per rank; returns the processes and the queue `results`."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    os.environ.update(environment)
    processes = [context.Process(target=target, args=(rank, job, results)) for rank in range(num_ranks)]
    for process in processes:
        process.start()
    for name in environment:
        del os.environ[name]
    return processes, results


def pss_bytes(pid: int) -> int:
    """Proportional set size: pages that several processes share are counted once in the sum over them."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Pss line")
