"""The two axes along which data-parallel ranks are arranged: those that shard a model, and those that replicate it.

    world of 8, 2 replicas        shard axis ->
                       replica    0 1 2 3
                       axis       4 5 6 7

Neighbouring ranks share a shard group, because it carries almost all of the traffic and neighbours are on one host.
An axis of one rank has no process group of its own and never communicates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.distributed as dist

from minift.dist.process import World


@dataclass(frozen=True)
class Mesh:
    """world: everybody. shard: the ranks among which this rank's replica is cut up. replica: the ranks that hold the
    same shard. reduce: the ranks of `shard`, with a communicator of their own where a backend runs the collectives of
    one communicator one after the other (NCCL), so that a reduce-scatter does not wait behind a prefetched
    all-gather.
    """

    world: World
    shard: World
    replica: World
    reduce: World


def make_mesh(world: World, shard_size: int) -> Mesh:
    """Arrange `world` in groups of `shard_size` ranks. ValueError unless that divides its size. Collective."""
    if shard_size < 1 or world.size % shard_size:
        raise ValueError(f"{world.size} processes cannot form groups of {shard_size}; valid: a divisor of {world.size}")
    first = world.rank - world.rank % shard_size
    shard = _axis(world, list(range(first, first + shard_size)))
    replica = _axis(world, list(range(world.rank % shard_size, world.size, shard_size)))
    reduce = _axis(world, list(range(first, first + shard_size)), anew=True) if world.backend == "nccl" else shard
    return Mesh(world, shard, replica, reduce)


def _axis(world: World, ranks: list[int], anew: bool = False) -> World:
    """`ranks`, numbered in `world`, as a world of their own."""
    if len(ranks) == world.size and not anew:
        return world
    axis = replace(world, rank=ranks.index(world.rank), size=len(ranks))
    if len(ranks) == 1 or world.group is None:
        return axis  # never used to communicate, so whose group it names does not matter
    members = [dist.get_global_rank(world.group, rank) for rank in ranks]
    # Only the members meet: the other groups are being made by the others at the same time.
    group = dist.new_group(members, backend=world.backend, use_local_synchronization=True)
    return replace(axis, group=group)
