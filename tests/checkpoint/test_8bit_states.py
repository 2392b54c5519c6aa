"""Checkpoints of 8-bit optimizer states, which have one entry for an element, for 256 or for none.

Oracle: the state of one process that was never saved, bit for bit, and its next step.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minift.checkpoint.manifest import Standing
from minift.checkpoint.saver import Saver
from minift.checkpoint.sharded import load_checkpoint
from minift.dist.collectives import gather_objects
from minift.dist.process import World
from minift.optim.adamw import AdamW
from minift.optim.config import OptimConfig
from tests.optim import eight_bit
from tests.ranks import run_ranks

CONFIG = OptimConfig(lr=1e-2, weight_decay=0.1, state="8bit")


def draw(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return eight_bit.flatten({n: torch.randn(shape, generator=generator) for n, shape in eight_bit.SHAPES.items()})


def optimizer_of(world: World, flat: Tensor, config: OptimConfig) -> AdamW:
    return eight_bit.optimizers(flat, world.size, config)[world.rank]


def step(world: World, optimizer: AdamW, seed: int) -> None:
    (shard,) = optimizer.shards
    size = len(shard.grad)
    gradient = torch.nn.functional.pad(draw(seed), (0, size * world.size - eight_bit.TOTAL))
    shard.grad.copy_(gradient[world.rank * size : (world.rank + 1) * size])
    optimizer.step(1.0)


def save(world: World, parent: Path, config: OptimConfig) -> None:
    """After three steps."""
    optimizer = optimizer_of(world, draw(0), config)
    for seed in (1, 2, 3):
        step(world, optimizer, seed)
    replica_world = replace(world, rank=0, size=1)
    with Saver(parent, optimizer, world, replica_world, keep_last=1) as saver:
        saver.start(Standing(3, {}, {}, {}))
        saver.wait()


def load(world: World, folder: Path, config: OptimConfig) -> list[dict[str, dict[str, Tensor]]]:
    """The state as it was saved, and after one more step, which must leave padding alone: it shares blocks."""
    optimizer = optimizer_of(world, torch.zeros(eight_bit.TOTAL), config)
    load_checkpoint(folder, optimizer, world)
    states = []
    for seed in (None, 4):
        if seed is not None:
            step(world, optimizer, seed)
        states.append(eight_bit.whole(gather_objects(optimizer, world)))
    (shard,) = optimizer.shards
    for piece in shard.ranges:
        shard.master[piece.start : piece.stop] = 0.0
    assert not shard.master.any()
    return states


@pytest.fixture(scope="module")
def expected() -> list[dict[str, dict[str, Tensor]]]:
    ranks, states = eight_bit.optimizers(draw(0), 1, CONFIG), []
    for seed in (1, 2, 3, 4):
        eight_bit.step(ranks, draw(seed))
        states.append({n: {what: t.clone() for what, t in s.items()} for n, s in eight_bit.whole(ranks).items()})
    return states[2:]


@pytest.mark.parametrize("writers", [1, 2, 4])
@pytest.mark.parametrize("readers", [1, 2, 4])
def test_any_number_of_ranks_restores_the_same_bits(tmp_path: Path, writers: int, readers: int, expected) -> None:
    run_ranks(writers, save, tmp_path, CONFIG)
    for states in run_ranks(readers, load, tmp_path / "step-00000003", CONFIG):
        for ours, exact in zip(states, expected, strict=True):
            assert eight_bit.same(ours, exact)


def load_error(world: World, folder: Path, config: OptimConfig) -> str:
    optimizer = optimizer_of(world, torch.zeros(eight_bit.TOTAL), config)
    with pytest.raises(ValueError) as caught:
        load_checkpoint(folder, optimizer, world)
    assert not any(t.any() for t in [optimizer.shards[0].master, *optimizer.state_dict()["all"].values()])
    return str(caught.value)


def test_states_of_another_kind_are_refused(tmp_path: Path) -> None:
    run_ranks(1, save, tmp_path, CONFIG)
    for message in run_ranks(2, load_error, tmp_path / "step-00000003", OptimConfig()):
        assert "of a.weight there is master float32, exp_avg_codes uint8" in message
        assert "and here master float32, exp_avg float32" in message
