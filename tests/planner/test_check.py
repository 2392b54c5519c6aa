"""A run's report. Oracle: the run."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from minift.build import ModelSource
from minift.config import RunConfig
from minift.data.config import DataConfig
from minift.dist.process import World
from minift.dist.signals import StopRequest
from minift.fsdp import ShardPolicy
from minift.loop import TrainConfig
from minift.metrics import read_metrics
from minift.optim.config import OptimConfig
from minift.peft.lora import LoraConfig
from minift.planner import check
from minift.planner.calibration import Calibration, calibration_path, describe_machine
from minift.planner.check import FREE_DEVICE, FREE_NETWORK
from minift.precision import Precision
from minift.quant.linear import QuantConfig
from minift.recompute import RecomputeConfig
from minift.report import PlanResult
from minift.train import Run
from tests.ranks import run_ranks
from tests.tiny import write_conversations, write_model

SIZES = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model", tied=False, num_hidden_layers=3, **SIZES)
    write_conversations(folder / "train.jsonl", 24)
    return folder


def recipe(inputs: Path, run_dir: Path, max_steps: int = 3) -> RunConfig:
    return RunConfig(
        run_dir=str(run_dir),
        model=ModelSource(str(inputs / "model")),
        data=DataConfig(
            train=(str(inputs / "train.jsonl"),), validation_share=0, max_length_tokens=256, template="chatml"
        ),
        optim=OptimConfig(lr=1e-3),
        loop=TrainConfig(examples_per_step=8, microbatch_tokens=512, max_steps=max_steps),
    )


def go(world: World, config: RunConfig) -> tuple[PlanResult | None, int]:
    run = Run(config, world, StopRequest())
    run.go()
    return run.plan_check.result(), run.built.engine.sent_bytes()


QLORA = {"adapter": LoraConfig(r=4), "quant": QuantConfig()}


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {}),
        (1, QLORA | {"recompute": RecomputeConfig("full")}),
        (2, {"optim": OptimConfig(state="8bit"), "precision": Precision(wire="float32")}),
        (2, QLORA),
        (3, {"fsdp": ShardPolicy("zero2"), "adapter": LoraConfig(r=4, dropout=0.1)}),
        (2, {"fsdp": ShardPolicy(replicas=2)}),
    ],
    ids=["full", "qlora", "8bit", "qlora-2", "zero2-3", "replicas"],
)
def test_a_run_is_set_against_its_plan(inputs: Path, tmp_path: Path, world_size: int, changes: dict) -> None:
    """Held bytes to the byte; the peak within the planner's 5 %; all that was sent."""
    config = replace(recipe(inputs, tmp_path / "run"), **changes)
    result, _ = run_ranks(world_size, go, config)[0]
    assert result.step == 2
    for category, (planned, measured) in result.held.items():
        assert planned == measured, category
    assert result.peak[0] == pytest.approx(result.peak[1], rel=0.05)
    record = read_metrics(tmp_path / "run" / "metrics.jsonl")[0][1]
    assert result.sent == (record["sent_bytes"], record["sent_bytes"])
    assert (result.sent[1] > 0) == (config.fsdp.replicas > 1)  # else these ranks share memory
    report = (tmp_path / "run" / "report.md").read_text()
    assert "## Plan and measurement\n\nStep 2 on rank 0" in report
    assert f"| peak of a step ({result.peak_at}) | {result.peak[0] / 2**20:,.1f} | " in report


def go_calibrated(world: World, config: RunConfig, cache: str) -> PlanResult | None:
    """On a machine of which it is said that a step takes 2.5 s, whatever it does."""
    device = replace(FREE_DEVICE, step_s=2.5)
    network = replace(FREE_NETWORK, meet_s=0.0)
    os.environ["XDG_CACHE_HOME"] = cache
    try:
        Calibration(describe_machine("cpu"), "", {1: 1}, {1: device}, {1: network}).save(calibration_path("cpu"))
        return go(world, config)[0]
    finally:
        del os.environ["XDG_CACHE_HOME"]


def go_pretending(world: World, config: RunConfig) -> PlanResult | None:
    """On what says of itself that it is an H100."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "link_of", lambda engine: "nccl")
        patch.setattr(check, "this_gpu", lambda: "h100")
        return go(world, config)[0]


@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_of_one_gpu_are_set_against_its_datasheet(inputs: Path, tmp_path: Path, world_size: int) -> None:
    """Bound by the host, with 512 tokens: 3 blocks, a head and an update are 100 to 200 operations of 30 µs."""
    result = run_ranks(world_size, go_pretending, recipe(inputs, tmp_path / "run", 4))[0]
    if world_size > 1:  # connected nobody knows how
        assert result.seconds is None
    else:
        assert 100 * 30e-6 < result.seconds[0] < 200 * 30e-6 and result.seconds[1] > 0


@pytest.mark.parametrize("max_steps", [1, 2, 4])
def test_steps_are_timed_where_the_machine_was_calibrated(inputs: Path, tmp_path: Path, max_steps: int) -> None:
    config = recipe(inputs, tmp_path / "run", max_steps)
    (result,) = run_ranks(1, go_calibrated, config, str(tmp_path))
    report = (tmp_path / "run" / "report.md").read_text()
    if max_steps < 4:  # none came after the one in which bytes were counted
        assert result.seconds is None and "planned to take" not in report
    else:
        measured = [record["step_seconds"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")[0]][2:]
        assert result.seconds[0] == 2.5 and 0 < result.seconds[1] <= sum(measured) / len(measured)
        assert f"were planned to take 2.500 s each, and took {result.seconds[1]:.3f} s" in report


def test_a_run_of_one_step_is_checked_in_that(inputs: Path, tmp_path: Path) -> None:
    result, _ = run_ranks(1, go, recipe(inputs, tmp_path / "run", max_steps=1))[0]
    assert result.step == 1 and result.peak[0] == pytest.approx(result.peak[1], rel=0.05)
