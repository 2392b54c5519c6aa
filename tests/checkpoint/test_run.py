"""What a training run does with checkpoints that cannot be written, or are not what was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from minift.build import ModelSource
from minift.checkpoint import live_file
from minift.checkpoint.manifest import StoredFile, list_checkpoints
from minift.config import RunConfig
from minift.data.config import DataConfig
from minift.dist.process import World
from minift.dist.signals import StopRequest
from minift.loop import TrainConfig
from minift.metrics import read_metrics
from minift.optim.config import OptimConfig
from minift.peft.lora import LoraConfig
from minift.precision import Precision
from minift.train import Run
from tests.ranks import run_ranks
from tests.tiny import write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def config_for(inputs: Path, run_dir: Path, **loop: int) -> RunConfig:
    return RunConfig(
        run_dir=str(run_dir),
        model=ModelSource(str(inputs / "model")),
        data=DataConfig(train=(str(inputs / "train.jsonl"),), max_length_tokens=256, template="chatml"),
        adapter=LoraConfig(r=4, alpha=8.0, dropout=0.3),
        optim=OptimConfig(lr=1e-2, schedule="constant"),  # so that max_steps changes no step
        precision=Precision(wire="float32"),
        loop=TrainConfig(examples_per_step=8, microbatch_tokens=256, epochs=100.0, **loop),
    )


def run(world: World, config: RunConfig) -> list[str]:
    """What the run says before its first step."""
    this = Run(config, world, StopRequest())
    this.go()
    return list(this.notes)


def run_until_the_disk_is_full(world: World, config: RunConfig) -> tuple[int, str]:
    """The third file that rank 1 writes does not fit. Returns the step at which that ended the run, and why."""
    stored, count = live_file._Sink.stored, 0

    def limited(sink: live_file._Sink) -> StoredFile:
        nonlocal count
        count += 1
        if count == 3 and world.rank == 1:
            raise OSError(28, "No space left on device")
        return stored(sink)

    this = Run(config, world, StopRequest())
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError) as caught:
        patch.setattr(live_file._Sink, "stored", limited)
        this.go()
    return this.step, str(caught.value)


def test_a_full_disk_ends_the_run_on_all_ranks_at_one_step(inputs: Path, tmp_path: Path) -> None:
    config = config_for(inputs, tmp_path, max_steps=40, checkpoint_every_steps=2)
    (step, message), other = run_ranks(2, run_until_the_disk_is_full, config)
    assert (step, message) == other
    assert 6 <= step < 40 and "rank 1: OSError: [Errno 28] No space left" in message
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000002", "step-00000004"]


def test_a_damaged_checkpoint_is_passed_over_and_the_run_repeats_nothing(inputs: Path, tmp_path: Path) -> None:
    """Oracle: the undisturbed run, bit for bit, although the one that resumes lost two steps to the damage."""
    run_ranks(2, run, config_for(inputs, tmp_path / "straight", max_steps=9))
    run_ranks(2, run, config_for(inputs, tmp_path / "damaged", max_steps=6, checkpoint_every_steps=2))
    victim = tmp_path / "damaged" / "checkpoints" / "step-00000006" / "rank-00001-of-00002.safetensors"
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 4
    victim.write_bytes(raw)
    older = victim.parents[1] / "step-00000004"
    for (note,) in run_ranks(2, run, config_for(inputs, tmp_path / "damaged", max_steps=9)):
        assert note.startswith(f"{victim} is damaged") and note.endswith(f"going back to {older}")
    ours, theirs = (
        [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(tmp_path / name / "metrics.jsonl")[0]]
        for name in ("damaged", "straight")
    )
    assert [step for step, *_ in ours] == list(range(1, 10))
    assert ours == theirs
