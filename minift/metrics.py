"""What a run reports about itself: peak memory and the log file, metrics.jsonl. Plain Python; knows no ranks.

The caller passes values that are already reduced over all ranks (a rank's own loss is not a loss) and already on the
host (reading a tensor waits for the device; the caller chooses when). The log has one JSON object a line, of two kinds:

  training    {"step": optimizer steps done so far (1 = after the first), "epoch": passes over the data so far (float),
               "loss": mean over the step's supervised tokens, nats/token, "lr", "grad_norm": before clipping,
               "tokens": packed tokens of the step, "targets": supervised ones, "tokens_per_second", "step_seconds",
               "memory_bytes": largest peak of any rank, "sent_bytes": weights and gradients that each rank sent; what
               JSON has no number for is null, and its name and value ("nan", "inf", "-inf") are in "nonfinite": {}}
  validation  {"step", "validation_loss": mean over its supervised tokens, nats/token, "validation_targets"}
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch

Records = list[dict[str, Any]]


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far (Linux)."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024  # "VmHWM:     1234 kB"


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


def read_metrics(path: str | Path) -> tuple[Records, Records]:
    """(training, validation) records, each ordered by step.

    A resumed run writes the steps after its checkpoint a second time; what was written the first time is forgotten. A
    last line that was cut off by a crash is ignored. Raises FileNotFoundError; ValueError for a bad line.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    training: Records = []
    validation: Records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step, is_validation = record["step"], "validation_loss" in record
            record |= {key: float(text) for key, text in record.pop("nonfinite", {}).items()}
        except (json.JSONDecodeError, KeyError, TypeError):
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not a metrics record: {line[:80]!r}") from None
        for earlier in [validation] if is_validation else [training, validation]:
            while earlier and earlier[-1]["step"] >= step:  # seen before: the run went on from an earlier checkpoint
                earlier.pop()
        (validation if is_validation else training).append(record)
    return training, validation


def _truncate(path: Path, last_step: int) -> None:
    kept = [json.dumps(record) + "\n" for record in read_jsonl(path) if record["step"] <= last_step]
    replacement = path.with_name(path.name + ".tmp")
    replacement.write_text("".join(kept))
    os.replace(replacement, path)  # all or nothing
