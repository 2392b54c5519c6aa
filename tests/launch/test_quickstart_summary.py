"""The quickstart's last page, on made-up results; oracle: the counts that were made up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "launch" / "quickstart_summary.py"


def grades(kinds: list[str]) -> dict:
    fixed = {"answer": "f(a=1)\nline", "reason": ""}
    results = [
        {"question": f"question {i}?", "correct": kind == "correct", "kind": kind, **fixed}
        for i, kind in enumerate(kinds)
    ]
    return {"correct": kinds.count("correct"), "total": len(kinds), "results": results}


def test_last_page(tmp_path):
    before = ["not a call"] * 9 + ["correct"]
    after = ["correct"] * 7 + ["wrong arguments"] * 2 + ["wrong function"]
    (tmp_path / "before.json").write_text(json.dumps(grades(before)))
    (tmp_path / "after.json").write_text(json.dumps(grades(after)))
    (tmp_path / "train").mkdir()
    records = [
        {"step": 0, "validation_loss": 2.5, "validation_targets": 3},
        {"step": 1, "tokens": 100, "step_seconds": 1.0},
        {"step": 2, "tokens": 999, "step_seconds": 9.0},  # done again after a restart from step 1
        {"step": 2, "tokens": 300, "step_seconds": 1.0},
        {"step": 2, "validation_loss": 0.25, "validation_targets": 3},
    ]
    (tmp_path / "train" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    command = [sys.executable, str(SCRIPT), str(tmp_path), "--wall-seconds", "12"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert json.loads(lines[-1]) == {
        "before_correct": 1,
        "after_correct": 7,
        "total": 10,
        "train_seconds": 2.0,
        "train_tokens_per_second": 200.0,
        "wall_seconds": 12.0,
    }
    cells = {" ".join(line.split()[:-2]): line.split()[-2:] for line in lines if len(line.split()) > 2}
    assert cells["correct"] == ["1", "7"]
    assert cells["wrong arguments"] == ["0", "2"]
    assert cells["loss per supervised token, held out"] == ["2.500", "0.250"]
    assert [line for line in lines if line.startswith("question ")] == [f"question {i}?" for i in (0, 2, 4, 6, 8)]
