"""8-bit moments of a model that the engine has sharded: the same bits on 1, 2, 3 and 4 ranks, given equal gradients.

(The gradients that ranks add up are equal to rounding only, so here they are given.) Oracle: one rank.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from minift.dist.collectives import gather_objects
from minift.dist.process import World
from minift.fsdp import ShardPolicy
from minift.optim.adamw import AdamW
from minift.optim.config import OptimConfig
from minift.precision import Precision
from tests.fsdp.trees import BF16_MASTERS, FP32, Case, sharded
from tests.optim import eight_bit
from tests.ranks import run_ranks

CASE = Case(1, width=67, hidden=83, depth=2, vocab=101)  # norms and biases small, the rest not
CONFIG = OptimConfig(lr=1e-2, weight_decay=0.1, state="8bit")


def gradient(name: str, step: int, numel: int) -> Tensor:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(random.Random(f"{name} {step}").getrandbits(32))
    return torch.randn(numel, generator=generator)


def train(world: World, case: Case, precision: Precision) -> dict[str, dict[str, Tensor]]:
    """All weights and states after three updates."""
    model, engine = sharded(case, world, precision)
    optimizer = AdamW(engine.trainable_shards(), CONFIG)
    for step in range(3):
        for shard in optimizer.shards:
            shard.grad.zero_()
            for piece in shard.ranges:
                whole = gradient(piece.name, step, torch.Size(piece.full_shape).numel())
                shard.grad[piece.start : piece.stop] = whole[piece.param_start :][: piece.stop - piece.start]
        optimizer.step(1.0, grad_factor=0.5)
    return eight_bit.whole(gather_objects(optimizer, engine.shard_world))


@pytest.mark.parametrize("precision", [FP32, BF16_MASTERS], ids=["fp32", "bf16 masters"])
@pytest.mark.parametrize("policy", [ShardPolicy(), ShardPolicy(strategy="zero1"), ShardPolicy(strategy="ddp")])
def test_any_number_of_ranks_gives_the_same_bits(policy: ShardPolicy, precision: Precision) -> None:
    (alone,) = run_ranks(1, train, CASE.but(policy=policy), precision)
    assert {name for name, state in alone.items() if "exp_avg_codes" in state} == {
        "embed.weight", *(f"blocks.{block}.{part}.weight" for block in range(2) for part in ("up", "down"))
    }  # fmt: skip
    for world_size in (2, 3, 4):
        for states in run_ranks(world_size, train, CASE.but(world_size=world_size, policy=policy), precision):
            assert eight_bit.same(states, alone)
