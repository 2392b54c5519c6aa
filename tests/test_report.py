"""metrics.jsonl -> records, loss.png, report.md. Oracles: the records written; a plain mean over each window."""

from __future__ import annotations

import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minift.metrics import JsonlWriter
from minift.report import RunFacts, plot_run, read_metrics, smooth, write_report


def training_record(step, loss=1.0):
    return {
        "step": step, "epoch": step / 4, "loss": loss, "lr": 1e-4, "grad_norm": 0.5, "tokens": 100, "targets": 25,
        "tokens_per_second": 50.0, "step_seconds": 2.0, "memory_bytes": 3 * 2**29,
    }  # fmt: skip


def validation_record(step, loss=1.5):
    return {"step": step, "validation_loss": loss, "validation_targets": 30}


FACTS = RunFacts(
    status="finished",
    objective="sft",
    method="Lora",
    model_path="models/tiny llama",
    model_family="llama",
    num_parameters=1000,
    num_trainable_parameters=50,
    data={"training": "3 examples | 1 dropped"},
    world_size=2,
    device="cpu",
    seconds_by_phase={"load model": 1.0, "train": 3.0},
    adapter_folder="runs/a/export/adapter",
    model_folder=None,
)


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


@given(st.lists(st.floats(-1e3, 1e3) | st.just(math.nan), min_size=1, max_size=100))
def test_smoothing_is_the_mean_of_a_centred_window(values):
    half = round(len(values) / 30)
    for i, got in enumerate(smooth(values)):
        window = [value for value in values[max(0, i - half) : i + half + 1] if math.isfinite(value)]
        # sums of at most 100 numbers of 1e3 in fp64: far below 1e-8
        assert got == pytest.approx(statistics.fmean(window), abs=1e-8) if window else math.isnan(got)


@pytest.mark.parametrize("num_steps", [1, 2, 70])
def test_report_and_picture(tmp_path, num_steps):
    run = tmp_path / "run"
    run.mkdir()
    records = [validation_record(0), *(training_record(step, 2.0 / step) for step in range(1, num_steps + 1))]
    if num_steps == 70:
        records[-1] |= {"loss": None, "nonfinite": {"loss": "nan"}}
    records.append(validation_record(num_steps, 0.75))
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = write_report(run, FACTS).read_text()
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in run.iterdir()) == ["loss.png", "metrics.jsonl", "report.md"]
    for part in (
        "50 (5.00%)",
        "3 examples \\| 1 dropped",
        f"| validation loss, best | 0.7500 | {num_steps} |",
        "| train | 3.0 s | 75% |",
        f"{100 * num_steps:,} tokens of which {25 * num_steps:,} supervised: 50 tokens/s, 2.00 s a step",
        "1.50 GiB",
        "minift generate --model 'models/tiny llama' --adapter runs/a/export/adapter --prompt",
        f"minift train {run}/config.yaml",
    ):
        assert part in text


def test_nothing_to_plot_is_said(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(validation_record(0)) + "\n")
    with pytest.raises(ValueError, match="has no training step yet"):
        plot_run(tmp_path)
    assert "## Loss" not in write_report(tmp_path, FACTS).read_text()
