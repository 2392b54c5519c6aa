"""Checkpoints of sharded runs: N ranks write, M ranks read.

Oracle: the full tensors before saving, which every reader must reproduce bit for bit; for the optimizer, the weights
after one more step with the same gradient.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from minift.checkpoint import sharded
from minift.checkpoint.sharded import MANIFEST, Standing, list_checkpoints, load_checkpoint, save_checkpoint
from minift.dist.process import World
from minift.fsdp import ShardedModel, ShardPolicy, shard
from minift.model.linear import Linear
from minift.optim.adamw import AdamW
from minift.optim.config import OptimConfig
from minift.precision import Precision
from tests.ranks import run_ranks


class Net(nn.Module):
    def __init__(self, seed: int, width: int = 5) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Linear(width, 3, bias=True), Linear(3, 7, bias=True), Linear(7, width)])
        self.blocks[1].bias.requires_grad = False
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        self.blocks[1].bias.data.fill_(0.5)  # frozen, so not in a checkpoint: the same for every seed

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x.square().sum()


def make(world: World, seed: int, width: int = 5) -> tuple[Net, ShardedModel, AdamW]:
    model = Net(seed, width)
    engine = shard(model, list(model.blocks), world, ShardPolicy(), Precision(wire="float32"))
    return model, engine, AdamW(engine.trainable_shards(), OptimConfig(lr=0.1))


def one_step(world: World, model: Net, optimizer: AdamW, step: int) -> None:
    """The same global gradient at any world size: only rank 0's loss counts, the others add exact zeros."""
    x = torch.full((2, 5), 0.1 * (step + 1))
    (model(x) * float(world.rank == 0)).backward()
    optimizer.step(1.0)
    optimizer.zero_grad()


def full(engine: ShardedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.full_tensors(trainable_only=True)}


def train_and_save(world: World, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(100 + world.rank)
    model, engine, optimizer = make(world, seed=0)
    for step in range(2):
        one_step(world, model, optimizer, step)
    save_checkpoint(folder, Standing(2, {"epoch": 1}, {"a": "b"}), optimizer.shards, optimizer, world, keep_last=2)
    saved, random = full(engine), torch.rand(3)
    one_step(world, model, optimizer, 2)
    return {"random": random, **saved}, full(engine)


def load_and_train(world: World, folder: Path) -> tuple[Standing, dict[str, Tensor], dict[str, Tensor]]:
    model, engine, optimizer = make(world, seed=1)
    progress = load_checkpoint(list_checkpoints(folder)[-1], optimizer.shards, optimizer, world)
    loaded, random = full(engine), torch.rand(3)
    one_step(world, model, optimizer, 2)
    return progress, {"random": random, **loaded}, full(engine)


@pytest.mark.parametrize("writers", [1, 2, 3])
@pytest.mark.parametrize("readers", [1, 2, 3])
def test_any_world_size_restores_the_same_bits(writers: int, readers: int, tmp_path: Path) -> None:
    written = run_ranks(writers, train_and_save, tmp_path)
    for rank, (progress, loaded, later) in enumerate(run_ranks(readers, load_and_train, tmp_path)):
        assert progress == Standing(2, {"epoch": 1}, {"a": "b"})
        saved, saved_later = written[0]
        for name in saved.keys() - {"random"}:
            assert torch.equal(loaded[name], saved[name]), name
            assert torch.equal(later[name], saved_later[name]), f"{name} after one more step: the moments differ"
        if writers == readers:
            assert torch.equal(loaded["random"], written[rank][0]["random"])


def save_many(world: World, folder: Path) -> None:
    _, _, optimizer = make(world, seed=0)
    for step in (1, 2, 3, 10):
        save_checkpoint(folder, Standing(step, {}, {}), optimizer.shards, optimizer, world, keep_last=2)


def test_keeps_the_newest(tmp_path: Path) -> None:
    run_ranks(2, save_many, tmp_path)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000010"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]


def load_error(world: World, folder: Path, width: int) -> str:
    _, _, optimizer = make(world, seed=1, width=width)
    with pytest.raises(ValueError) as caught:
        load_checkpoint(list_checkpoints(folder)[-1], optimizer.shards, optimizer, world)
    return str(caught.value)


def test_a_flipped_bit_a_missing_file_and_another_model_are_refused(tmp_path: Path) -> None:
    run_ranks(2, train_and_save, tmp_path)
    assert all("blocks.0.weight is (3, 5) there and (3, 6) here" in m for m in run_ranks(2, load_error, tmp_path, 6))

    victim = tmp_path / "step-00000002" / "rank-00001-of-00002.safetensors"
    intact = victim.read_bytes()
    victim.write_bytes(intact[:-9] + bytes([intact[-9] ^ 1]) + intact[-8:])
    assert all("damaged" in message for message in run_ranks(2, load_error, tmp_path, 5))
    victim.unlink()
    assert all("missing" in message for message in run_ranks(1, load_error, tmp_path, 5))


def test_a_folder_without_manifest_is_not_a_checkpoint(tmp_path: Path) -> None:
    run_ranks(1, save_many, tmp_path)
    (tmp_path / "step-00000010" / MANIFEST).unlink()
    shutil.copytree(tmp_path / "step-00000003", tmp_path / ".step-00000099.tmp")
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000003"]


def save_on_a_full_disk(world: World, folder: Path) -> str:
    _, _, optimizer = make(world, seed=0)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError) as caught:
        if world.rank == 1:
            patch.setattr(sharded, "save_file", _disk_full)
        save_checkpoint(folder, Standing(7, {}, {}), optimizer.shards, optimizer, world, keep_last=2)
    return str(caught.value)


def _disk_full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    raise OSError(28, "No space left on device")


def test_one_rank_that_cannot_write_fails_all_and_leaves_nothing(tmp_path: Path) -> None:
    run_ranks(2, save_many, tmp_path)
    for message in run_ranks(2, save_on_a_full_disk, tmp_path):
        assert "rank-00001-of-00002" in message and "No space left" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]
    assert json.loads((tmp_path / "step-00000010" / MANIFEST).read_text())["step"] == 10
