"""How everything here is measured: the same rules for every question, in one place.

1. *Equality first.* Whatever is compared has to compute the same before any of it is timed (`check_close`, and what a
   benchmark says about bits).
2. *Turns.* All variants live at once and take turns, A B C, C B A, ...; a ratio is the median of the ratios within the
   rounds, so other load on the machine meets both sides. Two numbers from two runs are never compared.
3. *A against A.* The outer variants follow themselves in this order (A B, B A, A B), which gives for nothing what two
   equal things differ by here: `Ratio.noise`. What lies within it is no difference.
4. *A load gate.* Nothing is measured while others use more than a tenth of the processors (`wait_until_quiet`); what
   they used during each round is written down, and rounds with more of it do not count (`Times`).
5. *Memory* on a CPU is the proportional set size, so that shared pages count once in a sum over ranks, or the peak of
   the resident one, with freed blocks returned to the system at once (`processes`); on CUDA it is
   `max_memory_allocated`.
6. *A result* is one record in one format, with the machine, the command and the parameters (`results`).

Not here: what is measured.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

QUIET_SHARE = 0.1
"""Of all processor time: what others may use while something is measured."""

PROC = Path("/proc")

Turn = Callable[[], float]
"""Does the work once and returns its seconds."""


# ------------------------------------------------------------------------------------------------------------ equality


def check_close(what: str, expected: Tensor, actual: Tensor, tolerance: float) -> None:
    """ValueError unless the largest difference is at most `tolerance` of the largest expected magnitude."""
    difference = (expected.double() - actual.double()).abs().max().item()
    largest = expected.double().abs().max().item()
    if not difference <= tolerance * largest:
        raise ValueError(f"{what}: results differ by {difference / largest:.1e} of the largest, above {tolerance:.1e}")


def check_losses(losses: Mapping[str, list[float]], tolerance: float) -> None:
    """ValueError unless, step for step, every variant's loss is within `tolerance` (relative) of the first one's."""
    (first, expected), *others = losses.items()
    for name, values in others:
        for step, (a, b) in enumerate(zip(expected, values, strict=True)):
            if not abs(a - b) <= tolerance * abs(a):
                raise ValueError(f"step {step}: the loss of {name} is {b}, of {first} {a}; tolerance {tolerance:.1e}")


# --------------------------------------------------------------------------------------------------------------- turns


@dataclass(frozen=True)
class Ratio:
    """The median of the ratios of neighbouring turns; `low` to `high` is its 95 % interval (bootstrap). `noise`: 95 %
    of such medians of one thing against itself lie within 1 / noise to noise."""

    median: float
    low: float
    high: float
    noise: float

    @property
    def is_noise(self) -> bool:
        return 1 / self.noise <= self.median <= self.noise


@dataclass(frozen=True)
class Times:
    """Seconds of each variant by round, and the share of the processors that others used in each round."""

    seconds: dict[str, list[float]]
    foreign: list[float] = field(default_factory=list)

    def counted_rounds(self) -> list[int]:
        """Those in which the machine was quiet; all of them, if fewer than half were (`is_quiet` is False then)."""
        rounds = range(len(next(iter(self.seconds.values()))))
        quiet = [number for number in rounds if not self.foreign or self.foreign[number] <= QUIET_SHARE]
        return quiet if 2 * len(quiet) >= len(rounds) else list(rounds)

    @property
    def is_quiet(self) -> bool:
        return all(self.foreign[number] <= QUIET_SHARE for number in self.counted_rounds() if self.foreign)

    def counted(self, name: str) -> list[float]:
        return [self.seconds[name][number] for number in self.counted_rounds()]

    def median(self, name: str) -> float:
        return statistics.median(self.counted(name))

    def fastest(self, name: str) -> float:
        return min(self.counted(name))

    def ratio(self, over: str, under: str) -> Ratio:
        """How many times as long `over` takes."""
        ratios = [a / b for a, b in zip(self.counted(over), self.counted(under), strict=True)]
        low, high = _interval(ratios)
        return Ratio(statistics.median(ratios), low, high, self.noise(len(ratios)))

    def noise(self, num_ratios: int) -> float:
        """See `Ratio`; 1 with fewer than three rounds, which say nothing about noise."""
        first, last = list(self.seconds)[0], list(self.seconds)[-1]
        logs = []
        counted = set(self.counted_rounds())
        for number in range(len(self.seconds[first]) - 1):
            itself = self.seconds[last if number % 2 == 0 else first]  # ends round `number` and begins the next one
            if {number, number + 1} <= counted:
                logs.append(math.log(itself[number] / itself[number + 1]))
        if len(logs) < 2:
            return 1.0
        low, high = _interval([*logs, *(-log for log in logs)], num_ratios)
        return math.exp(max(-low, high))


def _interval(values: list[float], count: int | None = None, resamples: int = 1000) -> tuple[float, float]:
    """2.5 and 97.5 percent of the medians of `count` values drawn with replacement; the same in every run."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=count or len(values))) for _ in range(resamples))
    return medians[int(0.025 * resamples)], medians[int(0.975 * resamples)]


def stopwatch(function: Callable[[], object], synchronize: Callable[[], object] | None = None, calls: int = 1) -> Turn:
    """A turn that calls `function` and tells the mean seconds of a call. `synchronize`, a barrier of all ranks or a
    wait for the device, stands before the first and after the last call."""

    def turn() -> float:
        if synchronize is not None:
            synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            function()
        if synchronize is not None:
            synchronize()
        return (time.perf_counter() - started) / calls

    return turn


def take_turns(variants: Mapping[str, Turn], rounds: int) -> Times:
    """Every variant once a round, in turning order. With several ranks all of them call this alike; each counts what
    was foreign to the whole benchmark."""
    load = Load()
    times = Times({name: [] for name in variants}, [])
    for number in range(rounds):
        for name in list(variants)[:: 1 if number % 2 == 0 else -1]:
            times.seconds[name].append(variants[name]())
        times.foreign.append(load.foreign_share())
    return times


# ----------------------------------------------------------------------------------------------------------- the load


class Load:
    """How busy others keep the processors: everything in /proc/stat that is not idle, less what the process group of
    this process used, its children included. The host of a virtual machine counts among the others ("steal")."""

    shortest_s = 0.5
    """Clocks of processes count in hundredths of a second: a shorter stretch joins the next one."""

    def __init__(self) -> None:
        self._at, self._share = self._read(), 0.0

    def foreign_share(self) -> float:
        """Of all processors, since the call before; of a longer stretch if that was just now. 0 without /proc."""
        now = self._read()
        if now is None or self._at is None or now[0] - self._at[0] < self.shortest_s:
            return self._share
        (_, busy, own), (_, busy_before, own_before) = now, self._at
        capacity = (now[0] - self._at[0]) * os.sysconf("SC_CLK_TCK") * (os.cpu_count() or 1)
        self._at, self._share = now, min(1.0, max(0.0, busy - busy_before - max(0, own - own_before)) / capacity)
        return self._share

    @staticmethod
    def _read() -> tuple[float, int, int] | None:
        """(clock in seconds, busy ticks of the machine, busy ticks of this process group)."""
        try:
            user, nice, system, _, _, irq, soft_irq, steal = map(int, (PROC / "stat").read_text().split()[1:9])
        except (OSError, ValueError):
            return None
        own, group = 0, str(os.getpgrp())
        for stat in PROC.glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()  # after the name: state, parent, group, ...
            except OSError:  # it has just ended
                continue
            if fields[2] == group:
                own += sum(map(int, fields[11:15]))  # user, system; and of its children that have ended
        return time.perf_counter(), user + nice + system + irq + soft_irq + steal, own


def wait_until_quiet(patience_s: float = 60.0) -> None:
    """Return as soon as others leave the processors alone for a second; SystemExit if they do not in `patience_s`."""
    load, began = Load(), time.perf_counter()
    while True:
        time.sleep(1.0)
        share = load.foreign_share()
        if share <= QUIET_SHARE:
            return
        if time.perf_counter() - began > patience_s:
            raise SystemExit(
                f"others use {share:.0%} of the processors, so nothing was measured; try again when the machine is "
                "quiet, or say --busy to measure all the same (the result will say so)"
            )
