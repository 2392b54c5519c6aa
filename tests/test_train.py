"""The training loop, whole, on 1, 2 and 4 processes.

Oracles: one process for the split over ranks (fp32, so that only the order of sums differs); an uninterrupted run for
resume (bitwise); PEFT's file format for what is exported.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minift.build import ModelSource
from minift.checkpoint.manifest import list_checkpoints
from minift.config import RunConfig
from minift.data.config import DataConfig
from minift.dist.process import World
from minift.dist.signals import StopRequest
from minift.fsdp import ShardPolicy
from minift.inference import answer, load_assistant, measure_loss
from minift.loop import TrainConfig
from minift.metrics import read_metrics
from minift.objectives.sft import SupervisedTokens
from minift.optim.config import OptimConfig
from minift.peft.lora import LoraConfig
from minift.peft.prefix import PrefixConfig
from minift.peft.prompt import PromptConfig
from minift.peft.virtual_tokens import VirtualTokensConfig
from minift.precision import Precision
from minift.recompute import RecomputeConfig
from minift.run_lock import run_lock
from minift.train import NonFiniteError, Run, train
from tests.checkpoint.kills import killed_before
from tests.ranks import run_ranks
from tests.tiny import write_conversations, write_inputs

FP32 = Precision(wire="float32")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    write_conversations(folder / "heldout.jsonl", 5)
    return folder


def config_for(inputs: Path, run_dir: Path, **loop: object) -> RunConfig:
    settings = {"examples_per_step": 8, "microbatch_tokens": 256, "epochs": 2.0, **loop}
    return RunConfig(
        run_dir=str(run_dir),
        model=ModelSource(str(inputs / "model")),
        data=DataConfig(
            train=(str(inputs / "train.jsonl"),),
            validation=(str(inputs / "heldout.jsonl"),),
            max_length_tokens=256,
            template="chatml",
        ),
        adapter=LoraConfig(r=4, alpha=8.0, dropout=0.0),
        optim=OptimConfig(lr=1e-2, warmup_steps=1),
        precision=FP32,
        loop=TrainConfig(**settings),
    )


def run(world: World, config: RunConfig, stop_at_step: int | None = None) -> None:
    """One rank of a run; `stop_at_step` plays a SIGTERM that arrives during that step."""
    stop = StopRequest()
    this = Run(config, world, stop)
    if stop_at_step is not None:
        original = this.guarded_step

        def step_and_signal(*args, **kwargs):
            if this.step + 1 == stop_at_step and world.rank == world.size - 1:
                stop.signal = signal.SIGTERM
            return original(*args, **kwargs)

        this.guarded_step = step_and_signal
    this.go()


def losses(run_dir: Path) -> list[tuple[float, float]]:
    training, _ = read_metrics(run_dir / "metrics.jsonl")
    return [(record["loss"], record["grad_norm"]) for record in training]


def exported(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "export" / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(("world_size", "microbatch_tokens"), [(1, 256), (2, 1024), (2, 256), (4, 256)])
def test_a_step_does_not_depend_on_how_its_examples_are_spread(
    inputs: Path, tmp_path: Path, world_size: int, microbatch_tokens: int
) -> None:
    """8 examples a step as one microbatch on one process, or over 2 and 4 ranks and several rounds."""
    run_ranks(1, run, config_for(inputs, tmp_path / "one", microbatch_tokens=4096))
    run_ranks(world_size, run, config_for(inputs, tmp_path / "split", microbatch_tokens=microbatch_tokens))
    expected, actual = losses(tmp_path / "one"), losses(tmp_path / "split")
    assert len(actual) == 6
    # The first steps have identical weights up to summation order: 1e-6. Adam then divides by second moments, which
    # amplifies rounding where gradients are near zero; the later steps are held to 1e-4.
    assert actual[0] == pytest.approx(expected[0], rel=1e-6)
    assert actual[1] == pytest.approx(expected[1], rel=1e-6)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    one, split = exported(tmp_path / "one"), exported(tmp_path / "split")
    assert one.keys() == split.keys()
    for name in one:  # six steps of at most lr = 0.01 each; where Adam sees only rounding it may go either way
        assert torch.allclose(split[name], one[name], atol=1e-3), name


def test_loss_falls_and_metrics_are_whole(inputs: Path, tmp_path: Path) -> None:
    run_ranks(2, run, config_for(inputs, tmp_path, epochs=6.0, validate_every_steps=5))
    training, validation = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in training] == list(range(1, 19))
    assert [record["step"] for record in validation] == [0, 5, 10, 15, 18]
    assert training[-1]["loss"] < 0.9 * training[0]["loss"]
    assert validation[-1]["validation_loss"] < validation[0]["validation_loss"]
    per_epoch = sum(record["targets"] for record in training[:3])
    assert all(sum(r["targets"] for r in training[i : i + 3]) == per_epoch for i in range(0, 18, 3))
    for name in ("config.yaml", "metrics.jsonl", "loss.png", "report.md", "export/adapter/adapter_config.json"):
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize("world_size", [1, 2])
def test_stop_and_resume_is_bitwise(inputs: Path, tmp_path: Path, world_size: int) -> None:
    """A signal in step 3 of 6 (on the last rank only), then the same command again; dropout makes generators count."""

    def with_dropout(folder: str) -> RunConfig:
        config = config_for(inputs, tmp_path / folder)
        return replace(config, adapter=LoraConfig(r=4, alpha=8.0, dropout=0.3), precision=Precision())

    run_ranks(world_size, run, with_dropout("straight"))
    run_ranks(world_size, run, with_dropout("stopped"), 3)
    assert [p.name for p in list_checkpoints(tmp_path / "stopped" / "checkpoints")] == ["step-00000003"]
    assert not (tmp_path / "stopped" / "export").exists()
    run_ranks(world_size, run, with_dropout("stopped"))
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    resumed, straight = exported(tmp_path / "stopped"), exported(tmp_path / "straight")
    assert all(torch.equal(resumed[name], straight[name]) for name in straight.keys() | resumed.keys())


def test_resume_on_another_world_size(inputs: Path, tmp_path: Path) -> None:
    run_ranks(1, run, config_for(inputs, tmp_path / "straight"))
    run_ranks(2, run, config_for(inputs, tmp_path / "stopped"), 3)
    run_ranks(3, run, config_for(inputs, tmp_path / "stopped"))
    for ours, theirs in zip(losses(tmp_path / "stopped"), losses(tmp_path / "straight"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def run_and_tell(world: World, config: RunConfig) -> list[str]:
    """What was changed, according to this rank."""
    this = Run(config, world, StopRequest())
    this.go()
    return this.changes


def test_resume_in_another_way_to_compute_the_same(inputs: Path, tmp_path: Path) -> None:
    run_ranks(1, run, config_for(inputs, tmp_path / "straight"))
    first = config_for(inputs, tmp_path / "stopped", keep_checkpoints=1)
    run_ranks(2, run, replace(first, fsdp=ShardPolicy("zero2")), 3)
    other = config_for(inputs, tmp_path / "stopped", microbatch_tokens=512, checkpoint_every_steps=2)
    other = replace(other, recompute=RecomputeConfig("full"), optim=replace(other.optim, paged=True))
    other.check_files()
    changes, not_told_twice = run_ranks(2, run_and_tell, other)
    assert "recompute.policy is full now and none there" in changes and not not_told_twice
    assert RunConfig.from_recipe(tmp_path / "stopped" / "config.yaml") == other
    for ours, theirs in zip(losses(tmp_path / "stopped"), losses(tmp_path / "straight"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(
    "adapter",
    [
        PrefixConfig(num_virtual_tokens=5, init="sample_vocab"),
        PrefixConfig(num_virtual_tokens=5, projection=True),
        PromptConfig(num_virtual_tokens=5, init="text", text="yes"),
    ],
    ids=["prefix", "prefix, projection", "prompt"],
)
def test_virtual_tokens_stop_resume_and_are_loaded(inputs: Path, tmp_path: Path, adapter: VirtualTokensConfig) -> None:
    """Two ranks, one in between. What was exported has the loss that was validated last, and answers."""

    def config(folder: str) -> RunConfig:
        made = config_for(inputs, tmp_path / folder, epochs=3.0, validate_every_steps=9)
        return replace(made, adapter=adapter, optim=OptimConfig(lr=0.1, warmup_steps=1))

    run_ranks(2, run, config("straight"))
    run_ranks(2, run, config("stopped"), 3)
    run_ranks(2, run, config("stopped"))
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    adapter_folder = tmp_path / "straight" / "export" / "adapter"
    assistant = load_assistant(str(inputs / "model"), str(adapter_folder), template="chatml", dtype=torch.float32)
    data = replace(config("straight").data, train=(str(inputs / "heldout.jsonl"),))
    loss = measure_loss(assistant, data, 256, World(0, 1, 0, torch.device("cpu"), "gloo", None))["loss"]
    _, validation = read_metrics(tmp_path / "straight" / "metrics.jsonl")
    assert loss == pytest.approx(validation[-1]["validation_loss"], rel=1e-5)
    assert loss < validation[0]["validation_loss"]
    assert isinstance(answer(assistant, "abab", max_new_tokens=4), str)
    report = (tmp_path / "straight" / "report.md").read_text()
    assert "minift generate" in report and "minift merge" not in report  # which would refuse it


def full_run(world: World, config: RunConfig) -> None:
    Run(replace(config, adapter=None, freeze=("embed_tokens",), precision=Precision()), world, StopRequest()).go()


@pytest.mark.parametrize("world_size", [1, 2])
def test_full_fine_tuning_exports_a_model_folder(inputs: Path, tmp_path: Path, world_size: int) -> None:
    run_ranks(world_size, full_run, config_for(inputs, tmp_path, max_steps=2))
    base = load_file(inputs / "model" / "model.safetensors")
    tuned = load_file(tmp_path / "export" / "model" / "model.safetensors")
    assert tuned.keys() == base.keys()
    for name in base:
        assert torch.equal(tuned[name], base[name]) == ("embed_tokens" in name), name
    assert (tmp_path / "export" / "model" / "tokenizer.json").is_file()


class InfiniteOnRank0(SupervisedTokens):
    """From the fifth microbatch on, the loss of rank 0 is infinite."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.num_calls = rank, 0

    def __call__(self, model, batch):
        self.num_calls += 1
        loss = super().__call__(model, batch)
        return replace(loss, loss_sum=loss.loss_sum * float("inf")) if self.num_calls > 4 and self.rank == 0 else loss


def run_with_infinite_loss(world: World, config: RunConfig) -> str:
    this = Run(config, world, StopRequest())
    this.objective = InfiniteOnRank0(world.rank)
    with pytest.raises(NonFiniteError) as caught:
        this.go()
    buckets = [bucket for bucket in this.built.engine.buckets if bucket.trainable]
    assert all(bucket.grad_is_empty for bucket in buckets), "NaN gradients would poison the next step"
    return str(caught.value)


def test_a_non_finite_loss_stops_all_ranks_and_leaves_the_batch(inputs: Path, tmp_path: Path) -> None:
    config = config_for(inputs, tmp_path, microbatch_tokens=1024, checkpoint_every_steps=1)
    messages = run_ranks(2, run_with_infinite_loss, config)
    kept = list_checkpoints(tmp_path / "checkpoints")
    for rank, message in enumerate(messages):
        (dump,) = (tmp_path / "nonfinite").glob(f"*-rank-{rank:05d}.safetensors")
        assert str(dump) in message and str(kept[-1]) in message
        assert "0/tokens_T" in load_file(dump)
    failed_step = int(dump.name.split("-")[1])
    assert kept[-1].name == f"step-{failed_step - 1:08d}"
    assert json.loads((kept[-1] / "manifest.json").read_text())["standing"]["step"] == failed_step - 1


def run_out_of_disk(world: World, config: RunConfig, can_dump: bool) -> str:
    """The checkpoint before the step that is not finite cannot be written, and perhaps the batch neither."""
    this = Run(config, world, StopRequest())
    this.objective = objective = InfiniteOnRank0(world.rank)
    wait = this.saver.wait

    def wait_or_fail() -> Path | None:
        folder = wait()
        if objective.num_calls > 4:
            raise OSError("no checkpoint was written: the disk is full")
        return folder

    this.saver.wait = wait_or_fail
    if not can_dump and world.is_main:
        (this.run_dir / "nonfinite").touch()
    with pytest.raises(NonFiniteError) as caught:
        this.go()
    return str(caught.value)


@pytest.mark.parametrize("can_dump", [True, False])
def test_a_full_disk_does_not_hide_a_non_finite_loss(inputs: Path, tmp_path: Path, can_dump: bool) -> None:
    config = config_for(inputs, tmp_path, microbatch_tokens=1024, checkpoint_every_steps=1)
    for message in run_ranks(2, run_out_of_disk, config, can_dump):
        assert "loss inf" in message and "the disk is full" in message and "last good checkpoint is" in message
        if can_dump:
            (dump,) = (path for path in (tmp_path / "nonfinite").iterdir() if str(path) in message)
            assert "0/tokens_T" in load_file(dump)
        else:
            assert "batch could not be written" in message and "nonfinite" in message


def in_the_export(event: str, arguments: tuple[Any, ...]) -> bool:
    return event == "open" and str(arguments[0]).endswith("adapter_config.json")


def before_a_rename_in_the_export(event: str, arguments: tuple[Any, ...]) -> bool:
    """Three: the new adapter is complete; the old one goes aside, if there is one; the new one gets its name."""
    return event == "os.rename" and "/export/" in str(arguments[0])


def before_the_report(event: str, arguments: tuple[Any, ...]) -> bool:
    name = Path(str(arguments[0])).name if arguments else ""
    return event == "open" and name.startswith("report") and name.endswith(".md")


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_run_killed_while_it_ends_is_ended_by_the_same_command(inputs: Path, tmp_path: Path) -> None:
    """All steps are done, and a checkpoint says so: that is not yet a finished run. Oracle: a run nobody killed."""
    straight, config = (config_for(inputs, tmp_path / name, max_steps=2) for name in ("straight", "killed"))
    assert train(straight) == 0
    run_dir = tmp_path / "killed"

    def kill(when: Callable[[str, tuple[Any, ...]], bool], index: int = 0) -> None:
        assert killed_before(when, index, train, config)
        assert not (run_dir / "report.md").exists()
        assert [p.name for p in list_checkpoints(run_dir / "checkpoints")] == ["step-00000002"]

    kill(before_the_report)
    assert exported(run_dir).keys() == exported(tmp_path / "straight").keys()
    shutil.rmtree(run_dir / "export")
    kill(in_the_export)
    assert not (run_dir / "export" / "adapter").exists()
    for index in (1, 1, 2, 1, 0):  # the first time there is nothing that would have to go aside
        kill(before_a_rename_in_the_export, index)
    assert train(config) == 0
    assert files_below(run_dir) == files_below(tmp_path / "straight")
    assert losses(run_dir) == losses(tmp_path / "straight")
    ours, theirs = exported(run_dir), exported(tmp_path / "straight")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_report_of_an_earlier_end_is_no_sign_of_this_one(inputs: Path, tmp_path: Path) -> None:
    assert train(config_for(inputs, tmp_path, max_steps=2)) == 0
    longer = config_for(inputs, tmp_path, max_steps=4)
    assert killed_before(before_the_report, 0, train, longer)
    assert train(longer) == 0
    assert "4 optimizer steps" in (tmp_path / "report.md").read_text()


def test_a_folder_where_another_run_is_at_work_is_left_alone(inputs: Path, tmp_path: Path) -> None:
    with run_lock(tmp_path), pytest.raises(ValueError, match="is training"):
        train(config_for(inputs, tmp_path, max_steps=2))
    assert files_below(tmp_path) == {".lock"}
    assert train(config_for(inputs, tmp_path, max_steps=2)) == 0


@pytest.mark.parametrize("run", [run, full_run])
def test_a_finished_run_is_left_alone(inputs: Path, tmp_path: Path, run: Callable[..., None]) -> None:
    run_ranks(2, run, config_for(inputs, tmp_path))

    def files() -> dict[Path, int]:
        kept = (p for p in tmp_path.rglob("*") if p.is_file() and p.suffix not in (".lock", ".yaml"))
        return {p: p.stat().st_mtime_ns for p in kept}

    before = files()
    run_ranks(2, run, config_for(inputs, tmp_path))
    assert files() == before
