"""Whole QLoRA runs: on other ranks, from another folder, after a stop, and the model that comes out of them.

Oracle: the same run on one process that is never stopped. Single gradients: test_qlora_gradients.py; bytes:
test_qlora_memory.py.
"""

from __future__ import annotations

import shlex
import signal
from pathlib import Path

import pytest
import torch

import minift.optim.moments
from minift.build import ModelSource
from minift.checkpoint.quantize import quantize_folder
from minift.cli import main
from minift.config import RunConfig
from minift.data.config import DataConfig
from minift.dist.process import World
from minift.dist.signals import StopRequest
from minift.inference import load_assistant, measure_loss
from minift.loop import TrainConfig
from minift.metrics import read_metrics
from minift.optim.config import OptimConfig
from minift.peft.lora import LoraConfig
from minift.precision import Precision
from minift.quant.linear import QuantConfig
from minift.train import Run
from tests.ranks import run_ranks
from tests.tiny import write_conversations, write_inputs

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    write_conversations(folder / "heldout.jsonl", 5)
    quantize_folder(folder / "model", folder / "nf4", QuantConfig())
    return folder


def config_for(inputs: Path, run_dir: Path, **changes) -> RunConfig:
    settings = {
        "run_dir": str(run_dir),
        "model": ModelSource(str(inputs / "model")),
        "data": DataConfig(
            train=(str(inputs / "train.jsonl"),),
            validation=(str(inputs / "heldout.jsonl"),),
            max_length_tokens=256,
            template="chatml",
        ),
        "adapter": LoraConfig(r=4, alpha=8.0),
        "quant": QuantConfig(),
        "optim": OptimConfig(lr=1e-2, state="8bit"),
        "precision": Precision(wire="float32"),
        "loop": TrainConfig(examples_per_step=8, microbatch_tokens=256, epochs=2.0, checkpoint_every_steps=3),
    }
    return RunConfig(**(settings | changes))


def train_on_rank(world: World, config: RunConfig, stop_at_step: int | None = None) -> None:
    stop = StopRequest()
    run = Run(config, world, stop)
    guarded_step = run.guarded_step

    def step(*args):
        if run.step + 1 == stop_at_step:
            stop.signal = signal.SIGTERM
        return guarded_step(*args)

    run.guarded_step = step
    run.go()


def losses(run_dir: Path) -> list[float]:
    training, validation = read_metrics(run_dir / "metrics.jsonl")
    return [record["loss"] for record in training] + [record["validation_loss"] for record in validation]


def test_a_run_is_the_same_on_any_ranks_from_any_folder_and_after_a_stop(inputs: Path, tmp_path: Path) -> None:
    """On other ranks up to the order of sums, which Adam amplifies (see tests/test_train.py); else to the bit."""
    run_ranks(1, train_on_rank, config_for(inputs, tmp_path / "one"))
    expected = losses(tmp_path / "one")
    assert expected[-1] < expected[-2], "nothing was learnt"
    run_ranks(2, train_on_rank, config_for(inputs, tmp_path / "two"))
    assert losses(tmp_path / "two") == pytest.approx(expected, rel=1e-4)
    stored = config_for(inputs, tmp_path / "stored", model=ModelSource(str(inputs / "nf4")), quant=None)
    run_ranks(1, train_on_rank, stored)
    assert losses(tmp_path / "stored") == expected
    for stop_at_step in (4, None):
        run_ranks(1, train_on_rank, config_for(inputs, tmp_path / "stopped"), stop_at_step)
    assert losses(tmp_path / "stopped") == expected


def commands_of(report: Path) -> list[list[str]]:
    """The arguments of `minift` in report.md, with a prompt of four letters."""
    lines = report.read_text().splitlines()
    return [shlex.split(line.replace('"..."', "abab"))[1:] for line in lines if line.startswith("minift ")]


@pytest.mark.parametrize(
    ("folder", "quant"),
    [("model", QuantConfig()), ("nf4", None), ("model", QuantConfig(block_size=32, skip=("down_proj",)))],
    ids=["quantised on the way", "stored so", "otherwise than --nf4"],
)
def test_commands_of_the_report_work_on_the_base_that_was_trained_on(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture, folder: str, quant: QuantConfig | None
) -> None:
    """All but those that train. What they merge has, up to fp32's rounding, the loss that was validated last."""
    loop = TrainConfig(examples_per_step=8, microbatch_tokens=256, epochs=2.0)
    config = config_for(inputs, tmp_path, model=ModelSource(str(inputs / folder)), quant=quant, loop=loop)
    run_ranks(1, train_on_rank, config)
    commands = [command for command in commands_of(tmp_path / "report.md") if command[0] not in ("train", "plot")]
    assert [command[0] for command in commands][-2:] == ["generate", "merge"]
    for command in commands:
        assert main([*command, "--max-new-tokens", "2"] if command[0] == "generate" else command) == 0
    merged = load_assistant(str(tmp_path / "export" / "merged"), template="chatml", dtype=torch.float32)
    data = DataConfig(train=(str(inputs / "heldout.jsonl"),), max_length_tokens=256, template="chatml")
    loss = measure_loss(merged, data, 256, World(0, 1, 0, CPU, "gloo", None))["loss"]
    assert loss == pytest.approx(losses(tmp_path)[-1], rel=1e-5)  # over dense weights it is 4e-4 off


def train_with_8bit_states(world: World, config: RunConfig, stop_at_step: int | None = None) -> None:
    """All of this model's parameters are too small to be kept in 8 bits, if nothing is done about it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minift.optim.moments, "MIN_8BIT_ELEMENTS", 64)
        train_on_rank(world, config, stop_at_step)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_8bit_states_survive_a_stop_to_the_bit(inputs: Path, tmp_path: Path, world_size: int, paged: bool) -> None:
    optim = OptimConfig(lr=1e-2, state="8bit", paged=paged)
    run_ranks(world_size, train_with_8bit_states, config_for(inputs, tmp_path / "whole", optim=optim))
    for stop_at_step in (4, None):
        config = config_for(inputs, tmp_path / "stopped", optim=optim)
        run_ranks(world_size, train_with_8bit_states, config, stop_at_step)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_an_adapter_is_used_on_the_base_it_was_trained_on(inputs: Path, tmp_path: Path) -> None:
    """The validation loss of the run comes out again with --nf4, and with the stored folder, and not without."""
    run_ranks(1, train_on_rank, config_for(inputs, tmp_path / "run"))
    expected = losses(tmp_path / "run")[-1]
    data = DataConfig(train=(str(inputs / "heldout.jsonl"),), max_length_tokens=256, template="chatml")

    def loss(folder: str, quant: QuantConfig | None) -> float:
        adapter = str(tmp_path / "run" / "export" / "adapter")
        assistant = load_assistant(
            str(inputs / folder), adapter, template="chatml", quant=quant, dtype=torch.float32, device=CPU
        )
        return measure_loss(assistant, data, 256, World(0, 1, 0, CPU, "gloo", None))["loss"]

    assert loss("model", QuantConfig()) == pytest.approx(expected, rel=1e-5)
    assert loss("nf4", None) == pytest.approx(expected, rel=1e-5)
    assert abs(loss("model", None) - expected) > 1e-3 * expected
