"""report.md and the picture beside it. Oracle: the records written."""

from __future__ import annotations

from dataclasses import replace

import pytest

from minift.data.documents import EncodeReport
from minift.quant.linear import QuantConfig
from minift.report import PlanResult, RunFacts, write_report
from tests.records import training_record, validation_record, write_records

FACTS = RunFacts(
    status="finished",
    objective="sft",
    method="Lora",
    model_path="models/tiny llama",
    model_family="llama",
    num_parameters=1000,
    num_trainable_parameters=50,
    data={"training": ["3 examples | 1 dropped"]},
    world_size=2,
    device="cpu",
    seconds_by_phase={"load model": 1.0, "train": 3.0},
    adapter_folder="runs/a/export/adapter",
    adapter_base="models/tiny llama",
    model_folder=None,
)


@pytest.mark.parametrize("num_steps", [1, 2, 70])
def test_report_and_picture(tmp_path, num_steps):
    run = tmp_path / "run"
    records = [validation_record(0), *(training_record(step, 2.0 / step) for step in range(1, num_steps + 1))]
    if num_steps == 70:
        records[-1] |= {"loss": None, "nonfinite": {"loss": "nan"}}
    records.append(validation_record(num_steps, 0.75))
    write_records(run, records)
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


def test_the_adapter_that_a_run_went_on_from_is_named(tmp_path):
    write_records(tmp_path / "run", [training_record(1, 2.0)])
    assert "goes on from" not in write_report(tmp_path / "run", FACTS).read_text()
    text = write_report(tmp_path / "run", replace(FACTS, earlier_adapter="runs/a/export/adapter")).read_text()
    assert "| goes on from | `runs/a/export/adapter` |" in text


def test_what_the_data_says_of_itself_is_one_row(tmp_path):
    """A sentence a line, also where a reason has several."""
    data = EncodeReport(
        64, "error", {"a.jsonl": "messages"}, rows=3, documents=1, tokens=9, targets=4,
        bad_rows=2, bad_row_examples=["a.jsonl:1: no answer; valid: one", "a.jsonl:2: broken\nin two"],
    )  # fmt: skip
    text = write_report(tmp_path, replace(FACTS, data={"training": data.lines()})).read_text()
    (row,) = (line for line in text.splitlines() if line.startswith("| data, training |"))
    assert row.removeprefix("| data, training | ").removesuffix(" |").split("<br>") == [
        "a.jsonl: messages",
        "3 rows -> 1 documents, 9 tokens, 4 of them supervised",
        "2 bad rows were skipped, the first of them:",
        "a.jsonl:1: no answer; valid: one",
        "a.jsonl:2: broken",
        "in two",
    ]


@pytest.mark.parametrize(
    ("quant", "parts"),
    [
        (None, ("llama' --adapter runs/a/export/adapter --prompt", "llama' --adapter runs/a/export/adapter --out")),
        (QuantConfig(), ("export/adapter --nf4 --prompt", "export/adapter --nf4 --out")),
        (QuantConfig(icq=True), ("export/adapter --icq --prompt", "export/adapter --icq --out")),
        (
            QuantConfig(block_size=32, double_quant=False, skip=("down_proj", r"layers\.0\."), icq=True),
            (
                r"export/adapter --icq --block-size 32 --no-double-quant --skip down_proj 'layers\.0\.' --prompt",
                r"export/adapter --icq --block-size 32 --no-double-quant --skip down_proj 'layers\.0\.' --out",
            ),
        ),
    ],
    ids=["dense", "nf4", "icq", "otherwise"],
)
def test_commands_hold_the_base_as_the_adapter_knows_it(tmp_path, quant, parts):
    write_records(tmp_path, [training_record(1)])
    text = write_report(tmp_path, replace(FACTS, adapter_quant=quant)).read_text()
    for part in parts:
        assert part in text


def test_a_recorded_step_can_be_drawn_again(tmp_path):
    write_records(tmp_path, [training_record(1)])
    assert "minift timeline" not in write_report(tmp_path, FACTS).read_text()
    (tmp_path / "timeline.json").write_text("{}")
    assert f"minift timeline {tmp_path}" in write_report(tmp_path, FACTS).read_text()


def test_what_was_planned_and_what_was_measured(tmp_path):
    write_records(tmp_path, [training_record(1)])
    mib = 2**20
    plan = PlanResult(
        step=2,
        held={"weights": (100 * mib, 100 * mib), "gradients": (0, 0), "optimizer state": (33 * mib, 30 * mib)},
        peak=(190 * mib, 200 * mib),
        peak_at="head",
        sent=(0, 0),
    )
    text = write_report(tmp_path, replace(FACTS, plan=plan)).read_text()
    for row in (
        "| weights | 100.0 | 100.0 | +0.0% |",
        "| optimizer state | 33.0 | 30.0 | +10.0% |",
        "| held between steps | 133.0 | 130.0 | +2.3% |",
        "| peak of a step (head) | 190.0 | 200.0 | -5.0% |",
    ):
        assert row in text
    assert "gradients" not in text and "sent in a step" not in text
    assert "sent in a step | 1.0 | 1.0" in write_report(
        tmp_path, replace(FACTS, plan=replace(plan, sent=(mib, mib)))
    ).read_text()  # fmt: skip


def test_a_run_without_a_step_has_a_report_without_a_picture(tmp_path):
    write_records(tmp_path, [validation_record(0)])
    assert "## Loss" not in write_report(tmp_path, FACTS).read_text()
