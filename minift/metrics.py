"""What a run reports about itself: throughput, time left, memory, and the log file. Plain Python; knows no ranks.

The caller passes values that are already reduced over all ranks (a rank's own loss is not a loss) and already on the
host (reading a tensor waits for the device; the caller chooses when).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Throughput:
    """Tokens per second and time left, fed once per optimizer step. The clock starts at construction.

    The recent rate and the time left look at the last `window_steps` steps, so that start-up (the first step allocates
    and records) is soon forgotten; the overall rate counts everything, checkpoints and evaluation included.
    """

    def __init__(self, window_steps: int = 20, clock: Callable[[], float] = time.monotonic) -> None:
        assert window_steps >= 1
        self._clock = clock
        self._start_s = clock()
        self._total_tokens = 0
        # (time, tokens up to then) at both ends of each step in the window
        self._marks: deque[tuple[float, int]] = deque([(self._start_s, 0)], maxlen=window_steps + 1)

    def add_step(self, num_tokens: int) -> None:
        """One optimizer step over `num_tokens` tokens (of all ranks, padding not counted) has just ended."""
        self._total_tokens += num_tokens
        self._marks.append((self._clock(), self._total_tokens))

    @property
    def tokens_per_s(self) -> float:
        """Over the window; 0 before the first step."""
        (start_s, start_tokens), (stop_s, stop_tokens) = self._marks[0], self._marks[-1]
        return _rate(stop_tokens - start_tokens, stop_s - start_s)

    @property
    def overall_tokens_per_s(self) -> float:
        """From construction to the end of the last step; 0 before the first step."""
        return _rate(self._total_tokens, self._marks[-1][0] - self._start_s)

    def seconds_left(self, steps_left: int) -> float | None:
        """For `steps_left` steps as long as the mean of the window; None before the first step."""
        num_steps = len(self._marks) - 1
        return steps_left * (self._marks[-1][0] - self._marks[0][0]) / num_steps if num_steps else None


def resident_bytes() -> int:
    """Resident memory of this process now (Linux). Pages that processes share count in each of them."""
    return _process_status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far (Linux)."""
    return _process_status_bytes("VmHWM")


def peak_device_bytes(device: torch.device) -> int:
    """Most that tensors have occupied on `device` since the start, or `torch.cuda.reset_peak_memory_stats`.

    On a CPU this is the peak of the whole process. On CUDA the context (about 0.5 GB) and free cached memory are not
    in it.
    """
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()


class JsonlWriter:
    """Appends records to a file, one JSON object per line, each visible to readers as soon as it is written.

    A record is flat and has an integer "step". NaN and infinities are not JSON: they are written as null, and the
    record gets "nonfinite": {key: "nan" | "inf" | "-inf"}, so a diverged run can still be read by everything.

    Args:
        path: the file; its folder exists.
        resume_step: None: a new run, the file must not exist yet. k: the run continues after step k; records of later
            steps, and a last line that a crash cut off, are removed first, so that no step is in the log twice.
    """

    def __init__(self, path: Path | str, resume_step: int | None = None) -> None:
        self.path = Path(path)
        if resume_step is None:
            if self.path.exists():
                raise ValueError(f"the log {self.path} exists already; resume that run, or choose another folder")
        elif self.path.exists():
            _truncate(self.path, resume_step)
        # O_APPEND and one write per line: a reader, or a crash, never sees two records mixed.
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record. Raises ValueError without an integer "step"; TypeError for what JSON does not know."""
        if not isinstance(record.get("step"), int):
            raise ValueError(f'a log record needs an integer "step", but has {record.get("step")!r}')
        nonfinite = {k: str(v) for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
        if nonfinite:
            record = {**record, **dict.fromkeys(nonfinite), "nonfinite": nonfinite}
        line = json.dumps(record, allow_nan=False) + "\n"
        os.write(self._file, line.encode())

    def close(self) -> None:
        os.close(self._file)


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """Records of a log, oldest first. A last line without its newline is a write that a crash cut off: not returned."""
    lines = Path(path).read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]


def _truncate(path: Path, last_step: int) -> None:
    kept = [json.dumps(record) + "\n" for record in read_jsonl(path) if record["step"] <= last_step]
    replacement = path.with_name(path.name + ".tmp")
    replacement.write_text("".join(kept))
    os.replace(replacement, path)  # all or nothing


def _rate(amount: float, duration_s: float) -> float:
    return amount / duration_s if duration_s > 0 else 0.0


def _process_status_bytes(field: str) -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024  # "VmRSS:     1234 kB"
