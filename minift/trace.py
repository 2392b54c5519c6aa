"""Records what happens when within a step: spans of time by lane, and the bytes that are alive. Off until asked.

A mark is a moment: on a CPU the clock, on CUDA an event on the current stream, so that recording never waits for the
device. While the recorder is off a mark is None and costs nothing. Ranks' clocks are not compared: each counts from its
own `Recorder.start`. `timeline` turns what was recorded into a Chrome trace and a picture.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch

Lane = Literal["compute", "all-gather", "reduce-scatter"]
Mark = float | torch.cuda.Event


@dataclass(frozen=True)
class Span:
    """`kind` (forward, backward, recompute, optimizer, all-gather, reduce-scatter, wait) of `name`, a unit's name.

    Seconds since `Recorder.start`. A wait is time in which compute stood still for a collective.
    """

    lane: Lane
    kind: str
    name: str
    start_s: float
    stop_s: float


@dataclass(frozen=True)
class Level:
    """Bytes of one kind of buffer (gathered, gradients) in use from `time_s` on."""

    kind: str
    time_s: float
    num_bytes: int


@dataclass(frozen=True)
class Trace:
    """One rank's step."""

    rank: int
    spans: list[Span] = field(default_factory=list)
    levels: list[Level] = field(default_factory=list)


class Recorder:
    """Collects marks between `start()` and `stop()`."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self.rank = rank
        self.device = device
        self.enabled = False
        self._spans: list[tuple[Lane, str, str, Mark, Mark]] = []
        self._levels: list[tuple[str, Mark, int]] = []
        self._bytes_in_use: dict[str, int] = {}

    def start(self) -> None:
        """Forget what was recorded before, and begin."""
        self._spans, self._levels = [], []
        self.enabled = True
        self._begin = self._now()
        for kind in self._bytes_in_use:
            self.change_level(kind, 0)

    def mark(self) -> Mark | None:
        """This moment, on the current stream; None while the recorder is off."""
        return self._now() if self.enabled else None

    def span(self, lane: Lane, kind: str, name: str, start: Mark | None, stop: Mark | None = None) -> None:
        """From `start` until `stop` (now, if not given). What began before the recorder was on is left out."""
        if self.enabled and start is not None:
            self._spans.append((lane, kind, name, start, self._now() if stop is None else stop))

    @contextmanager
    def during(self, lane: Lane, kind: str, name: str) -> Iterator[None]:
        """The time that the block takes."""
        start = self.mark()
        yield
        self.span(lane, kind, name, start)

    def change_level(self, kind: str, num_bytes: int) -> None:
        """From now on `num_bytes` more of `kind` are in use (less, if negative). Counted at all times."""
        self._bytes_in_use[kind] = self._bytes_in_use.get(kind, 0) + num_bytes
        if self.enabled:
            self._levels.append((kind, self._now(), self._bytes_in_use[kind]))

    def stop(self) -> Trace:
        """What was recorded. Waits for the device."""
        self.enabled = False
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return Trace(
            self.rank,
            [Span(lane, kind, name, self._since(a), self._since(b)) for lane, kind, name, a, b in self._spans],
            [Level(kind, self._since(mark), num_bytes) for kind, mark, num_bytes in self._levels],
        )

    def _now(self) -> Mark:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _since(self, mark: Mark) -> float:
        if isinstance(mark, float):
            assert isinstance(self._begin, float)
            return mark - self._begin
        return self._begin.elapsed_time(mark) / 1e3
