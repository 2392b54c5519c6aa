"""What a person sees while a run goes on: a progress bar in a terminal, a few plain lines anywhere else.

    with Progress(total_steps=210, first_step=0, enabled=world.is_main) as progress:
        progress.step({"step": 1, "loss": 2.1, "tokens_per_second": 310.0, "memory_bytes": 2_000_000_000, ...})
        progress.say("validation loss 1.93 at step 20")

It shows the records of metrics.jsonl, which are already reduced over all ranks; it computes nothing but the time left.
Only rank 0 enables it. Lines written to a file or a log collector come at most about twenty-five times a run or once a
minute, whichever is more often.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

PLAIN_LINES_PER_RUN = 25
PLAIN_LINE_EVERY_SECONDS = 60.0


class Progress:
    """Shows optimizer steps `first_step` … `total_steps`; `enabled=False` shows nothing. `console`: where (stderr)."""

    def __init__(
        self, total_steps: int, first_step: int = 0, enabled: bool = True, console: Console | None = None
    ) -> None:
        self.total_steps = total_steps
        self.first_step = first_step
        self.enabled = enabled
        self.console = console or Console(stderr=True)
        self._started = self._last_line = time.monotonic()
        self._every_steps = max(1, total_steps // PLAIN_LINES_PER_RUN)
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        self._started = self._last_line = time.monotonic()
        if self.enabled and self.console.is_terminal:
            columns = ("train", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[summary]}"), "left")
            self._bar = Bar(*columns, TimeRemainingColumn(), console=self.console)
            self._task = self._bar.add_task("", total=self.total_steps, completed=self.first_step, summary="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()  # gives the terminal its cursor back, also when the run fails
            self._bar = None

    def step(self, record: dict[str, Any]) -> None:
        """Show one training record of metrics.jsonl (see report.py for its keys)."""
        if not self.enabled:
            return
        step, now = record["step"], time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, summary=summarise(record))
            return
        is_edge = step in (self.first_step + 1, self.total_steps)
        if is_edge or step % self._every_steps == 0 or now - self._last_line > PLAIN_LINE_EVERY_SECONDS:
            seconds_per_step = (now - self._started) / max(1, step - self.first_step)
            left = show_seconds(seconds_per_step * (self.total_steps - step))
            self._line(f"step {step}/{self.total_steps}  {summarise(record)}  left {left}")
            self._last_line = now

    def say(self, text: str) -> None:
        """Print a line above the bar: a validation loss, a checkpoint written, a warning."""
        if self.enabled:
            self._line(text)

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def summarise(record: dict[str, Any]) -> str:
    """One training record in a few words."""
    return (
        f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s  "
        f"{record['memory_bytes'] / 2**30:.2f} GiB"
    )


def show_seconds(seconds: float) -> str:
    """7.3 s, 4:07, 1:02:09"""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
