"""What a run writes into metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path


def training_record(step, loss=1.0):
    return {
        "step": step, "epoch": step / 4, "loss": loss, "lr": 1e-4, "grad_norm": 0.5, "tokens": 100, "targets": 25,
        "tokens_per_second": 50.0, "step_seconds": 2.0, "memory_bytes": 3 * 2**29,
    }  # fmt: skip


def validation_record(step, loss=1.5):
    return {"step": step, "validation_loss": loss, "validation_targets": 30}


def write_records(folder: Path, records: list[dict]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
