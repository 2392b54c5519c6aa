"""Checkpoints of the engine itself: written under one strategy, read under another, on another number of ranks.

Oracle: the full tensors before saving; for the optimizer's state, the weights after one more step, gradients equal.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from minift.checkpoint.manifest import Standing
from minift.checkpoint.saver import Saver
from minift.checkpoint.sharded import load_newest
from minift.dist.process import World
from minift.fsdp import ShardedModel, ShardPolicy, shard
from minift.model.linear import Linear
from minift.optim.adamw import AdamW
from minift.optim.config import OptimConfig
from minift.precision import Precision
from tests.ranks import run_ranks

Weights = dict[str, Tensor]
POLICIES = {
    "zero3": ShardPolicy(),
    "zero2": ShardPolicy(strategy="zero2"),
    "zero1": ShardPolicy(strategy="zero1"),
    "ddp": ShardPolicy(strategy="ddp"),
    "hsdp": ShardPolicy(replicas=2),
    "offload": ShardPolicy(offload=True),
}


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Linear(5, 3, bias=True), Linear(3, 7, bias=True), Linear(7, 5)])
        self.blocks[1].bias.requires_grad = False
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        self.blocks[1].bias.data.fill_(0.5)  # frozen, so not in a checkpoint: the same for every seed

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x.square().sum()


def make(world: World, policy: ShardPolicy, seed: int) -> tuple[Net, ShardedModel, AdamW]:
    model = Net(seed)
    engine = shard(model, list(model.blocks), world, policy, Precision(wire="float32"))
    return model, engine, AdamW(engine.trainable_shards(), OptimConfig(lr=0.1))


def one_step(world: World, model: Net, engine: ShardedModel, optimizer: AdamW, step: int) -> None:
    """The same global gradient at any world size: only rank 0's loss counts, the others add exact zeros."""
    x = torch.full((2, 5), 0.1 * (step + 1))
    (model(x) * float(world.rank == 0)).backward()
    optimizer.step(1.0)
    engine.weights_changed()
    engine.clear_gradients()


def full(engine: ShardedModel) -> Weights:
    return {name: tensor.clone() for name, tensor in engine.full_tensors(trainable_only=True)}


def train_and_save(world: World, parent: Path, policy: ShardPolicy) -> tuple[Weights, Weights]:
    """The weights that were saved, and those after the next step, which is done while the save is under way."""
    model, engine, optimizer = make(world, policy, seed=0)
    for step in range(2):
        one_step(world, model, engine, optimizer, step)
    saved = full(engine)
    with Saver(parent, optimizer, world, engine.replica_world, keep_last=1) as saver:
        saver.start(Standing(2, {}, {}))
        one_step(world, model, engine, optimizer, 2)
    return saved, full(engine)


def load_and_train(world: World, parent: Path, policy: ShardPolicy) -> tuple[Weights, Weights]:
    model, engine, optimizer = make(world, policy, seed=1)
    assert load_newest(parent, optimizer, world) is not None
    engine.weights_changed()
    loaded = full(engine)
    one_step(world, model, engine, optimizer, 2)
    return loaded, full(engine)


WRITERS = [("zero3", 4), ("zero2", 2), ("zero1", 4), ("ddp", 2), ("hsdp", 4), ("offload", 2)]


@pytest.fixture(scope="module", params=WRITERS, ids=[f"{name} on {num_ranks}" for name, num_ranks in WRITERS])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights, Weights]:
    """A checkpoint, the weights in it, and those of the next step."""
    name, num_ranks = request.param
    parent = tmp_path_factory.mktemp("checkpoints")
    (saved, later), *_ = run_ranks(num_ranks, train_and_save, parent, POLICIES[name])
    return parent, saved, later


@pytest.mark.parametrize(("name", "num_ranks"), [(name, 6 - num_ranks) for name, num_ranks in WRITERS])
def test_any_strategy_reads_what_any_other_wrote(
    written: tuple[Path, Weights, Weights], name: str, num_ranks: int
) -> None:
    parent, saved, later = written
    for loaded, after_load in run_ranks(num_ranks, load_and_train, parent, POLICIES[name]):
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)
        assert all(torch.equal(after_load[name], later[name]) for name in later)
