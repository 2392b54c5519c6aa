from __future__ import annotations

import json
import math

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minift import metrics
from minift.metrics import JsonlWriter, read_jsonl


def test_peak_memory_keeps_what_was_freed():
    """Oracle: psutil's count of what is resident now, after 512 MiB were touched and given back."""
    block = torch.ones(512 << 20, dtype=torch.uint8)
    del block
    now = psutil.Process().memory_info().rss
    assert metrics.peak_device_bytes(torch.device("cpu")) == metrics.peak_resident_bytes() > now + (400 << 20)


numbers = st.floats() | st.integers(-(2**53), 2**53) | st.none() | st.text(max_size=5)
values = st.dictionaries(st.text(max_size=5).filter(lambda k: k not in ("step", "nonfinite")), numbers, max_size=3)


@given(st.lists(values, max_size=5))
def test_what_is_written_is_read(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    writer = JsonlWriter(path)
    for step, record in enumerate(records):
        writer.write({"step": step, **record})
        assert len(read_jsonl(path)) == step + 1  # at once, not at close
    writer.close()
    for step, (record, read) in enumerate(zip(records, read_jsonl(path), strict=True)):
        flagged = read.pop("nonfinite", {})
        assert read.pop("step") == step
        assert flagged == {k: str(v) for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
        assert read == {k: None if k in flagged else v for k, v in record.items()}


def test_a_diverged_value_is_null_with_a_flag(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write({"step": 1, "loss": math.nan, "grad_norm": -math.inf, "lr": 0.1})
    with pytest.raises(ValueError):
        writer.write({"step": 2, "nested": {"loss": math.nan}})  # a record is flat
    (line,) = writer.path.read_text().splitlines()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "lr": 0.1,
        "nonfinite": {"loss": "nan", "grad_norm": "-inf"},
    }


@given(st.integers(0, 6), st.integers(0, 6), st.booleans())
def test_resume_keeps_each_step_once(tmp_path_factory, done, resume_step, torn):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    first = JsonlWriter(path)
    for step in range(1, done + 1):
        first.write({"step": step, "run": 1})
    first.close()
    if torn:
        with path.open("a") as file:
            file.write('{"step": 1, "lo')
    second = JsonlWriter(path, resume_step)
    for step in range(resume_step + 1, 8):
        second.write({"step": step, "run": 2})
    second.close()
    kept = min(done, resume_step)
    expected = [(step, 1) for step in range(1, kept + 1)] + [(step, 2) for step in range(resume_step + 1, 8)]
    assert [(r["step"], r["run"]) for r in read_jsonl(path)] == expected


def test_a_new_run_does_not_continue_an_old_log(tmp_path):
    JsonlWriter(tmp_path / "metrics.jsonl").close()
    with pytest.raises(ValueError, match="exists already"):
        JsonlWriter(tmp_path / "metrics.jsonl")
    JsonlWriter(tmp_path / "other.jsonl", resume_step=3).close()  # a run that was stopped before its first record


def test_bad_records_are_refused(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match='integer "step", but has None'):
        writer.write({"loss": 1.0})
    with pytest.raises(TypeError):
        writer.write({"step": 1, "loss": torch.ones(())})
    assert read_jsonl(writer.path) == []
