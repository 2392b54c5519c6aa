"""Lines end at column 120, also where ruff does not look: in C++, CUDA, shell and recipes. Oracle: they are counted."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("minift", "csrc", "tests", "benchmarks", "launch")
ENDINGS = {".h", ".cpp", ".cu", ".py", ".sh", ".yaml"}


def test_lines_end_at_column_120():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in ENDINGS]
    assert {path.suffix for path in files} == ENDINGS
    longer = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if len(line) > 120
    ]
    assert longer == []
