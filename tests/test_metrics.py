from __future__ import annotations

import json
import math

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minift import metrics
from minift.metrics import JsonlWriter, read_jsonl, read_metrics
from tests.records import training_record, validation_record


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


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4))
def test_a_resumed_run_forgets_what_it_wrote_after_its_checkpoint(tmp_path_factory, lives):
    """Each life goes on from step `start` at most where the last one was, does `count` steps, validates after each."""
    path = tmp_path_factory.getbasetemp() / "metrics.jsonl"
    written, expected, reached = [], {}, 0
    for life, (back, count) in enumerate(lives):
        start = max(0, reached - back)
        expected = {step: record for step, record in expected.items() if step <= start}
        for step in range(start + 1, start + count + 1):
            expected[step] = (training_record(step, loss=life), validation_record(step, loss=life))
            written += expected[step]
        reached = start + count
    path.write_text("".join(json.dumps(record) + "\n" for record in written))
    training, validation = read_metrics(path)
    assert training == [pair[0] for pair in expected.values()]
    assert validation == [pair[1] for pair in expected.values()]


def test_numbers_that_json_does_not_have_come_back(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(training_record(1, loss=math.inf))
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == ([training_record(1, loss=math.inf)], [])


def test_a_torn_last_line_is_ignored_and_any_other_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(training_record(1)) + '\n{"step": 2, "lo')
    assert read_metrics(path) == ([training_record(1)], [])
    path.write_text('{"step": 2, "lo\n' + json.dumps(training_record(1)))
    with pytest.raises(ValueError, match="metrics.jsonl, line 1: not a metrics record"):
        read_metrics(path)
