"""Processes that are killed, as by `kill -9`, at a moment that can be chosen: just before a certain file operation.

Python tells its audit hooks of every `open`, rename, removal, … before it happens, so a test can go through all moments
at which a process changes something on disk. Processes are forked from a server that has imported torch once.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from typing import Any

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


def fork_server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "minift.train", "tests.checkpoint.test_kill"])
    return context


def is_change(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an audit event is one that a folder looks different after."""
    return event in CHANGES


def killed_before(
    when: Callable[[str, tuple[Any, ...]], bool], index: int, function: Callable[..., None], *arguments: Any
) -> bool:
    """Call a top-level function in another process, killed before the `index`-th audit event (from 0) that `when`
    chooses. False if there are not so many and the function came to its end."""
    process = fork_server().Process(target=_call, args=(when, index, function, arguments))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"exit code {process.exitcode}"
    return process.exitcode != 0


def all_kills(function: Callable[..., None], prepare: Callable[[], tuple[Any, ...]]) -> Iterator[int]:
    """Run `function(*prepare())` again and again, killed before each change that it makes, one further each time."""
    for index in itertools.count():
        if not killed_before(is_change, index, function, *prepare()):
            return
        yield index


def _call(when: Callable[[str, tuple[Any, ...]], bool], index: int, function: Callable[..., None], arguments) -> None:
    left = index

    def hook(event: str, details: tuple[Any, ...]) -> None:
        nonlocal left
        if when(event, details):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(hook)
    function(*arguments)
