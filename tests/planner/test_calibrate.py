"""Figures of a machine. Oracles: lines that are known; what plans ask for; a file read back. How fast this machine is
is nowhere asserted."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minift.dist.process import World
from minift.model.config import ModelConfig
from minift.optim.config import OptimConfig
from minift.peft.dora import DoraConfig
from minift.peft.ia3 import IA3Config
from minift.peft.lora import LoraConfig
from minift.peft.prefix import PrefixConfig
from minift.peft.prompt import PromptConfig
from minift.planner import calibrate
from minift.planner.calibrate import Calibrator, fit_line, fit_rates
from minift.planner.calibration import Calibration, calibration_path
from minift.planner.describe import describe
from minift.planner.device import Device, Rate
from minift.planner.network import Network, Protocol
from minift.planner.op import Op
from minift.planner.samples import samples
from minift.planner.shapes import Workload
from minift.planner.timing import time_step
from minift.precision import Precision
from minift.quant.linear import QuantConfig
from minift.recompute import RecomputeConfig
from tests.planner.test_describe import TINY, Setup
from tests.ranks import run_ranks

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU, "gloo", group=None)


@given(
    st.lists(st.sampled_from([0.0, 1e-12, 3e-7, 2.0]), min_size=3, max_size=3),
    st.lists(st.tuples(st.floats(1, 1e9), st.floats(1, 1e6)), min_size=6, max_size=9),
)
def test_a_line_is_found_again(coefficients: list[float], points: list[tuple[float, float]]) -> None:
    """Its values, wherever there are points; and no coefficient is ever negative."""
    features = np.array([[1.0, *point] for point in points])
    values = features @ coefficients
    if not values.any():
        return
    found = fit_line(features, values)
    assert min(found) >= 0.0
    assert features @ found == pytest.approx(values, rel=1e-6)


def test_a_line_has_no_negative_slope() -> None:
    features = np.array([[1.0, x] for x in (1.0, 2.0, 3.0)])
    assert fit_line(features, np.array([3.0, 2.0, 1.0]))[1] == 0.0


def test_rates_say_what_was_measured() -> None:
    """A line for all, and what the samples were off it: near a sample, the sample."""
    ops = [Op("linear", "float32", n, 10 * n) for n in (1e4, 1e6, 1e8)]
    rates = fit_rates([(op, (1e-5 + op.flops / 1e9) * ratio) for op, ratio in zip(ops, (1.0, 1.3, 1.0), strict=True)])
    for op, ratio in zip(ops, (1.0, 1.3, 1.0), strict=True):
        assert rates["linear float32"].seconds(op) == pytest.approx((1e-5 + op.flops / 1e9) * ratio, rel=0.03)


def test_there_is_a_sample_for_everything_that_plans_count() -> None:
    measured = {f"{sample.op.kind} {sample.op.dtype}" for sample in (make() for make in samples(CPU))}
    device = Device("some", 1e9, 1e12, 1e9, dict.fromkeys(measured, Rate()))
    config = ModelConfig.from_hf(TINY | {"model_type": "qwen3", "head_dim": 32})
    network = Network(1e9, 1e9, 1, (Protocol(),))
    for method in (
        Setup(), Setup(LoraConfig(dropout=0.1)), Setup(LoraConfig(), QuantConfig()), Setup(DoraConfig()),
        Setup(IA3Config()), Setup(PromptConfig()), Setup(PrefixConfig()),
    ):  # fmt: skip
        for wire in ("bfloat16", "float32"):
            setup = replace(
                method,
                precision=Precision(wire=wire),
                optim=OptimConfig(state="8bit"),
                recompute=RecomputeConfig("full"),
            )
            for world_size, link in ((1, "shared memory"), (2, "shared memory"), (2, "paired sends")):
                run = describe(
                    config, setup, world_size=world_size, link=link, workload=Workload(tokens=64, document_tokens=16)
                )
                time_step(run, device, network)  # ValueError for what has no figures


def few_samples(device: torch.device):
    """The first of every kind and dtype."""
    seen = set()
    for make in samples(device, ("float32", "bfloat16")):
        op = make().op
        if (op.kind, op.dtype) not in seen:
            seen.add((op.kind, op.dtype))
            yield make


def figures_on_rank(world: World) -> tuple[Device, Network]:
    calibrate.samples = few_samples
    try:
        calibrator = Calibrator(world)
        calibrator.round()
        return calibrator.figures()
    finally:
        calibrate.samples = samples


@pytest.mark.parametrize("world_size", [1, 2])
def test_all_ranks_say_the_same(world_size: int) -> None:
    answers = run_ranks(world_size, figures_on_rank)
    assert answers == answers[:1] * world_size
    device, network = answers[0]
    assert 0 < device.peak_flops_per_s < 1e15 and 0 < device.memory_bytes_per_s < 1e13
    assert device.call_s + device.pass_s + device.step_s > 0.0
    assert network.meet_s > 0.0 if world_size > 1 else True
    assert math.isinf(network.inside_bytes_per_s) == (world_size == 1)


def some_calibration() -> Calibration:
    device = Device("cpu", 1e9, 1e12, 1e10, fit_rates([(Op("linear", "float32", 1e3, 1e4), 1e-5)]), call_s=1e-5)
    return Calibration("some", "2026-11-25", {1: 2, 2: 1}, {1: device, 2: device.slower(1.5)}, {
        1: Network(math.inf, math.inf, 1, (Protocol(),), 0.0), 2: Network(1e9, 1e9, 2, (Protocol(1e-4),), 1e-3)
    })  # fmt: skip


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = calibration_path("cpu")
    assert path.is_relative_to(tmp_path)
    some_calibration().save(path)
    assert Calibration.load(path) == some_calibration()
    path.write_text('{"format": 0}')
    with pytest.raises(ValueError, match="minift plan --calibrate"):
        Calibration.load(path)


def test_more_processes_than_were_measured_share_the_same_processors() -> None:
    calibration, op = some_calibration(), [Op("linear", "float32", 1e3, 1e4)]
    two, six = calibration.device(2), calibration.device(6)
    assert six.seconds(op) == pytest.approx(3 * two.seconds(op))
    assert calibration.network(6) == calibration.network(2)
