"""Finds work on a GPU that nothing puts in order: a stream that reads what another may still be writing, a host that
looks at a copy before it has arrived, memory that is given away while somebody uses it.

Who works (the host, each stream) counts what it does and knows up to which of the others' works it comes after: vector
clocks (Fidge 1988, Mattern 1989). An event is such knowledge, kept; to wait for it is to learn it; what the host gives
to a stream comes after all that the host knows. Every tensor operation on its way through PyTorch's dispatcher is
somebody's work, and uses bytes of storages; two uses of a byte, one of them writing, must be in order whatever the
device does first. A storage that is let go belongs to the stream that allocated it again, at once, as in PyTorch's
caching allocator: that stream must come after every use.

What takes time moves clocks, too: given `ends`, everybody's `now` is when all is done that it was given so far.

Not here: collectives of several ranks, and host memory that is let go (PyTorch keeps pinned memory until copies are
through).
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.utils._pytree import tree_leaves

_SOURCES = f"{Path(__file__).parents[2] / 'minift'}/"
_WITHOUT_VALUES = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")


class Moment(Protocol):
    """Of some work, or of a worker: what comes before it, and when that is done."""

    known: dict[Worker, int]
    now: float


class Worker:
    """The host or a stream."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.known: dict[Worker, int] = {self: 0}
        """Up to which of whose works it comes after."""
        self.now = 0.0

    def learn(self, moment: Moment) -> None:
        """Wait for it."""
        for worker, count in moment.known.items():
            self.known[worker] = max(self.known.get(worker, 0), count)
        self.now = max(self.now, moment.now)

    def comes_after(self, use: Use) -> bool:
        return self.known.get(use.worker, 0) >= use.count


@dataclass
class Use:
    """Bytes [start, stop) of a storage."""

    start: int
    stop: int
    writes: bool
    worker: Worker
    count: int
    place: list[tuple[str, int, str]]


@dataclass
class Memory:
    """A storage."""

    owner: Worker
    uses: list[Use] = field(default_factory=list)


class Order:
    """Everybody who works. `current`: the stream that gets what the host has to give. `mistakes`: what was found.
    `ends`: when an operation is done that begins then."""

    def __init__(self, compute: Worker) -> None:
        self.host = Worker("the host")
        self.current = compute
        self.mistakes: list[str] = []
        self.ends: Callable[[float, Any, tuple[Any, ...], dict[str, Any]], float] = lambda begins, *_: begins
        self._memories: dict[int, Memory] = {}

    @contextmanager
    def on(self, stream: Worker) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def watch(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """An operation, which has run: whose work it is, and what it uses."""
        given, made, written = tensors_in((args, kwargs)), tensors_in(result), written_by(function, args, kwargs)
        for tensor in (*given, *made):
            self.remember(tensor)
        there = {tensor.untyped_storage()._cdata for tensor in given}
        fresh = [tensor for tensor in made if tensor.untyped_storage()._cdata not in there]
        if function.overloadpacket.__name__ in _WITHOUT_VALUES or not (fresh or written):  # or a view
            return
        worker = self.current if any(tensor.is_cuda for tensor in (*given, *made)) else self.host
        read = [tensor for tensor in given if not any(tensor is other for other in written)]
        self.work(worker, read, [*written, *fresh])
        worker.now = self.ends(worker.now, function, args, kwargs)

    def work(self, worker: Worker, reads: list[Tensor], writes: list[Tensor]) -> None:
        """One piece of work of `worker`."""
        worker.learn(self.host)  # who gives it what to do
        worker.known[worker] += 1
        for tensors, is_written in ((reads, False), (writes, True)):
            for tensor in tensors:
                self._use(worker, tensor, is_written)

    def remember(self, tensor: Tensor) -> Memory:
        """What is known of the storage of `tensor`, from now on if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._memories:
            self._memories[key] = Memory(self.current if tensor.is_cuda else self.host)
            weakref.finalize(storage, self._let_go, key, tensor.is_cuda)
        return self._memories[key]

    def _use(self, worker: Worker, tensor: Tensor, writes: bool) -> None:
        if not tensor.numel():
            return
        memory = self.remember(tensor)
        start = tensor.storage_offset() * tensor.itemsize
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        mine = Use(start, start + span * tensor.itemsize, writes, worker, worker.known[worker], running())
        kept = []
        for use in memory.uses:
            meets = use.start < mine.stop and mine.start < use.stop
            if meets and (writes or use.writes) and not worker.comes_after(use):
                self._blame(f"{_told(mine)}, and nothing puts this after: {_told(use)}")
            is_inside = mine.start <= use.start and use.stop <= mine.stop
            if not (is_inside and (writes or (use.worker is worker and not use.writes))):
                kept.append(use)
        memory.uses = [*kept, mine]

    def _let_go(self, key: int, is_on_device: bool) -> None:
        memory = self._memories.pop(key)
        for use in memory.uses if is_on_device else ():
            if not (memory.owner.comes_after(use) or self.host.comes_after(use)):
                self._blame(f"{memory.owner.name} gets its memory back, and nothing puts this after: {_told(use)}")

    def _blame(self, mistake: str) -> None:
        if mistake not in self.mistakes:
            self.mistakes.append(mistake)


def written_by(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that `function` says it writes."""
    arguments = function._schema.arguments
    values = [*args, *(kwargs.get(argument.name) for argument in arguments[len(args) :])]
    return tensors_in(
        [
            value
            for argument, value in zip(arguments, values, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
    )


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def running() -> list[tuple[str, int, str]]:
    """The innermost lines of minift that are running: (path, line, function)."""
    found: list[tuple[str, int, str]] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < 3:
        if frame.f_code.co_filename.startswith(_SOURCES):
            found.append((frame.f_code.co_filename.removeprefix(_SOURCES), frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return found


def _told(use: Use) -> str:
    lines = " < ".join(f"{path}:{line} {function}" for path, line, function in use.place)
    return f"{use.worker.name} {'writes' if use.writes else 'reads'} at {lines}"
