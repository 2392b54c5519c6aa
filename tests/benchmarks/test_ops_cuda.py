"""ops_cuda through the CPU's kernels: every case runs, is right, and is told apart when it is not."""

from __future__ import annotations

import json

import cuda_nf4
import ops_cuda
import pytest
import torch
from cuda_case import TINY, Maker
from ops_cuda import BARS, held_to_bars

from minift.ops import extension

needs_extension = pytest.mark.skipif(extension.MISSING_REASON is not None, reason="needs the extension")


@needs_extension
def test_every_case_runs_and_is_right(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ops_cuda.py", "--device", "cpu", "--rounds", "1", "--busy"])
    ops_cuda.main()
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["name"].split(",")[0] for row in said["rows"]} >= {
        "NF4 dequantize", "NF4 quantize", "nf4_gemv", "nf4_linear", "nf4_linear_dx", "rms_norm", "rms_norm backward",
        "swiglu", "swiglu backward", "swiglu with updates", "swiglu with updates backward", "rope", "dropout",
        "cross_entropy_", "LM head", "AdamW", "LoRA", "sgmv_",
    }  # fmt: skip
    for row in said["rows"]:
        assert row["share"] > 0 and row["seconds"] > 0 and ("tflops" in row) != ("gb_per_s" in row)
        if not row["name"].startswith("NF4"):  # whose only peer may be missing
            assert row["ratios"] and all(ratio > 0 for ratio in row["ratios"].values())


@needs_extension
def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(cuda_nf4, "nf4_linear", lambda x, nf4: torch.ones(len(x), nf4.shape[0], dtype=x.dtype))
    case = next(cuda_nf4.nf4_products(Maker(torch.device("cpu"), TINY, None)))
    with pytest.raises(ValueError, match="nf4_gemv: results differ by"):
        ops_cuda.measure(case, torch.device("cpu"), (1.0, 1.0), 1, ops_cuda.Result("ops_cuda"))


def test_bytes_that_move_are_those_of_the_format():
    """4 bits and, nested, a byte for 64 weights and 4 for 256 of these; 2 bytes of bf16."""
    first = next(cuda_nf4.nf4(Maker(torch.device("cpu"), TINY, None)))
    weights = TINY.matrix[0] * TINY.matrix[1]
    assert first.bytes / weights == pytest.approx(2 + 4.127 / 8, abs=1e-4)


def test_bars():
    rows = [
        {"name": "NF4 dequantize, nested", "share": 0.9, "ratios": {"bitsandbytes": 1.1}},
        {"name": "LM head, 16384 rows", "share": 0.8, "tflops": 640.0, "extra_gb": 0.6, "ratios": {}},
    ]
    assert held_to_bars(rows) == {
        "NF4 dequantize, nested: share >= 0.87": {"value": 0.9, "met": True},
        "NF4 dequantize, nested: bitsandbytes >= 1.15": {"value": 1.1, "met": False},
        "LM head, 16384 rows: tflops >= 650": {"value": 640.0, "met": False},
        "LM head, 16384 rows: extra_gb <= 0.6": {"value": 0.6, "met": True},
    }
    names = {f"LM head, {rows} rows" for rows in ops_cuda.Sizes().head_rows}
    assert {name for name, *_ in BARS} <= names | {"NF4 dequantize, nested", "NF4 quantize"}


class StandInGpu:
    """Of torch.cuda, what measures: its clock goes on when something runs."""

    def __init__(self, monkeypatch) -> None:
        self.seconds = 0.0
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: StandInEvent(self))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.work(cycles / 2e9))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def work(self, seconds: float) -> None:
        self.seconds += seconds


class StandInEvent:
    def __init__(self, gpu: StandInGpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.seconds = self.gpu.seconds

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: StandInEvent) -> float:
        return (other.seconds - self.seconds) * 1e3


def test_a_turn_is_the_mean_of_calls_without_what_prepares_them(monkeypatch):
    gpu, calls = StandInGpu(monkeypatch), []
    turn = ops_cuda.event_stopwatch(lambda: calls.append("run") or gpu.work(1e-4), None)
    calls.clear()
    assert turn() == pytest.approx(1e-4) and 19 <= len(calls) <= 20  # 2 ms
    turn = ops_cuda.event_stopwatch(
        lambda: calls.append("run") or gpu.work(1e-4), lambda: calls.append("prepare") or gpu.work(1.0)
    )
    calls.clear()
    assert turn() == pytest.approx(1e-4) and calls == ["prepare", "run"]
