"""What one rank sends and stores in a step, and the work around that: collectives with their casts and sums, what
crosses the bus to host memory, and the optimizer's updates.

    exchange = exchange_of(run, unit)            of a `shapes.RunShape` and one of its units
    exchange.gather.full_bytes, exchange.updates

Counted as `fsdp/bucket.py`, `fsdp/transport.py` and `optim` have it. Not here: forward and backward (`work`), how long
links take (`network`) and the bus (`device`), the order of things (`simulate`).
"""

from __future__ import annotations

from dataclasses import dataclass

from minift.ops.blockwise import BLOCK
from minift.optim.memory import PinnedHost
from minift.optim.moments import MOMENTS, is_small
from minift.optim.segments import segments
from minift.planner.op import Op, cast, elementwise
from minift.planner.shapes import BucketShape, RunShape, UnitShape

DTYPE_OF_SIZE = {1: "uint8", 2: "bfloat16", 4: "float32"}


@dataclass(frozen=True)
class Transfer:
    """A collective. prepare and finish: operations on this rank before and after; full_bytes: of what is gathered, or
    reduced from; from_host_bytes: of this rank's shard, what comes over the bus before."""

    full_bytes: int
    prepare: tuple[Op, ...] = ()
    finish: tuple[Op, ...] = ()
    from_host_bytes: int = 0


@dataclass(frozen=True)
class Update:
    """The optimizer's work on one shard. pages_bytes: of moments that are brought from the host and back, piece by
    piece; empty: they are on the device."""

    op: Op
    pages_bytes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Exchange:
    """gather and reduce: None where there is nothing to. replica_bytes: of gradients that are summed over replicas.
    updates, square_sum: of this rank's shards, once a step."""

    gather: Transfer | None
    reduce: Transfer | None
    replica_bytes: int
    updates: tuple[Update, ...]
    square_sum: tuple[Op, ...]


def exchange_of(run: RunShape, unit: UnitShape) -> Exchange:
    gathered = [b for b in unit.buckets if not b.resident]
    trained = [b for b in unit.buckets if b.trainable]
    over_bus = [b for b in gathered if b.is_offloaded and run.is_on_gpu]
    gather = Transfer(
        sum(b.gather_bytes for b in gathered),
        prepare=tuple(
            cast(DTYPE_OF_SIZE[b.storage_itemsize], DTYPE_OF_SIZE[b.wire_itemsize], b.shard_numel)
            for b in gathered
            if b not in over_bus or b.storage_itemsize != b.wire_itemsize
        ),
        from_host_bytes=sum(b.shard_numel * b.storage_itemsize for b in over_bus),
    )
    reduce = Transfer(
        sum(b.full_numel * (4 if b.keeps_full_grads else b.grad_itemsize) for b in trained),
        finish=tuple(_added_up(b, run.shard_size) for b in trained if not (b.keeps_full_grads and run.shard_size == 1)),
    )
    return Exchange(
        gather if gathered else None,
        reduce if trained else None,
        sum(4 * b.shard_numel for b in trained) if run.world_size > run.shard_size else 0,
        tuple(_update(run, b) for b in trained),
        tuple(elementwise("square sum", "float32", b.shard_numel, 1) for b in trained),
    )


def _added_up(bucket: BucketShape, ranks: int) -> Op:
    """The chunks of all ranks into the fp32 shard: `transport.sum_chunks_`. Of a kept gradient, in place."""
    size = 4 if bucket.keeps_full_grads else bucket.grad_itemsize
    first = 0 if bucket.keeps_full_grads else size + 4
    return Op("sum", DTYPE_OF_SIZE[size], bucket.shard_numel * (first + (ranks - 1) * (size + 8)))


def _update(run: RunShape, bucket: BucketShape) -> Update:
    """Reads and writes weights and moments, reads gradients."""
    kind, moments_bytes = ("adamw 8bit", 2) if run.optim.state == "8bit" else ("adamw", 8)
    weight_bytes = bucket.storage_itemsize + bucket.lower_itemsize
    op = Op(kind, "float32", bucket.shard_numel * (2 * (weight_bytes + moments_bytes) + 4))
    if not (run.optim.paged and run.is_on_gpu):
        return Update(op)
    small = {r.name for r in bucket.ranges if is_small(r)}
    pages = []
    for segment in segments(bucket, run.optim, MOMENTS[run.optim.state].may_merge):
        is_8bit = run.optim.state == "8bit" and segment.name not in small
        for piece in segment.pieces(PinnedHost.piece_elements):
            elements = piece.stop - piece.start
            pages.append(2 * (elements + 4 * -(-elements // BLOCK)) if is_8bit else 8 * elements)
    return Update(op, tuple(pages))
