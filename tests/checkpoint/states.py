"""Trained state without a model: parameters of odd shapes, cut into flat shards in any way a strategy may choose.

The value of every element is a function of (parameter, what, seed) alone, so whoever holds an element knows what it
must be, whatever the cut.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minift.dist.process import World
from minift.optim.adamw import AdamW
from minift.optim.config import OptimConfig
from minift.optim.shard import FlatShard, ParamRange

SHAPES = {"embed": (11, 6), "a.weight": (3, 5), "a.bias": (7,), "b.weight": (2, 3, 4), "norm": (1,), "head": (9, 2)}


@dataclass(frozen=True)
class Cut:
    """How parameters become shards. `replicas`: copies of each shard (HSDP); all of them whole if `is_whole` (DDP).

    seed: which parameters share a bucket, in which order, with how much padding, and where the borders are.
    """

    replicas: int = 1
    is_whole: bool = False
    seed: int = 0
    master: torch.dtype = torch.float32
    in_halves: bool = False  # what is fp32

    def replica_world(self, world: World) -> World:
        """The ranks that hold the same shards."""
        size = self._shard_size(world)
        return replace(world, rank=world.rank // size, size=world.size // size)

    def optimizer(self, world: World) -> AdamW:
        """Over zeros."""
        size = self._shard_size(world)
        draw = random.Random(self.seed)
        names = draw.sample(list(SHAPES), len(SHAPES))
        shards = []
        for index, bucket in enumerate((names[:2], names[2:3], names[3:])):
            spans, end = [], 0
            for name in bucket:
                start = end + draw.randrange(4)
                end = start + torch.Size(SHAPES[name]).numel()
                spans.append((name, start, end))
            borders = [0, *sorted(draw.randrange(end + 1) for _ in range(size - 1)), end + draw.randrange(4)]
            begin, stop = borders[world.rank % size : world.rank % size + 2]
            ranges = [
                ParamRange(name, max(a, begin) - begin, min(b, stop) - begin, max(a, begin) - a, SHAPES[name])
                for name, a, b in spans
                if max(a, begin) < min(b, stop)
            ]
            master = torch.zeros(stop - begin, dtype=torch.bfloat16 if self.in_halves else self.master)
            lower = torch.zeros_like(master, dtype=torch.int16) if self.in_halves else None
            name = f"bucket.{index}:seed{self.seed}"
            shards.append(FlatShard(name, master, torch.zeros(stop - begin), ranges, lower))
        return AdamW(shards, OptimConfig(lr=0.1))

    def _shard_size(self, world: World) -> int:
        assert world.size % self.replicas == 0
        return 1 if self.is_whole else world.size // self.replicas


def expected(name: str, what: str, seed: int, dtype: torch.dtype) -> Tensor:
    """The whole of `what` of a parameter, flattened. Not negative: second moments are not."""
    generator = torch.Generator().manual_seed(hash_of(name, what, seed))
    return torch.rand(torch.Size(SHAPES[name]).numel(), generator=generator).to(dtype)


def hash_of(*parts: object) -> int:
    """The same in every process."""
    return random.Random(repr(parts)).getrandbits(32)


def fill(optimizer: AdamW, seed: int) -> None:
    """Give every element its value, and the optimizer `seed` steps."""
    optimizer.num_steps = seed
    for shard in optimizer.shards:
        for r in shard.ranges:
            here = slice(r.param_start, r.param_start + r.stop - r.start)
            shard.set_weights(expected(r.name, "master", seed, shard.weights().dtype)[here], r.start)
            for what, tensor in optimizer.state_dict()[shard.name].items():
                tensor[r.start : r.stop] = expected(r.name, what, seed, tensor.dtype)[here]


def differences(optimizer: AdamW, seed: int) -> list[str]:
    """Where the state is not, bit for bit, what `fill` makes; padding must be zero."""
    found = [] if optimizer.num_steps == seed else [f"{optimizer.num_steps} steps"]
    for shard in optimizer.shards:
        for what, tensor in ({"master": shard.weights()} | optimizer.state_dict()[shard.name]).items():
            right = torch.zeros_like(tensor)
            for r in shard.ranges:
                values = expected(r.name, what, seed, tensor.dtype)
                right[r.start : r.stop] = values[r.param_start : r.param_start + r.stop - r.start]
            if not torch.equal(tensor.view(torch.uint8), right.view(torch.uint8)):
                found.append(f"{shard.name}/{what}")
    return found
