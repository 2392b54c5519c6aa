"""What a step costs, in seconds of one rank, before anybody knows in which order: what `simulate` is told.

Priced by `timing`. Not here: operations (`work`, `exchange`), the order of events (`simulate`).
"""

from __future__ import annotations

from dataclasses import dataclass

from minift.fsdp.unit import Keep


@dataclass(frozen=True)
class Collective:
    """One all-gather, reduce-scatter or all-reduce.

    bus_s: the shard comes from host memory, before anything. prepare_s: copies into the buffer, before. wire_s: the
    link is taken by it. latency_s: until the result is there after the link is free again. finish_s: adds up what came,
    after. host_s: what of `wire_s` keeps the processor busy that computes, which is that much slower meanwhile.
    """

    prepare_s: float = 0.0
    wire_s: float = 0.0
    latency_s: float = 0.0
    finish_s: float = 0.0
    host_s: float = 0.0
    bus_s: float = 0.0


@dataclass(frozen=True)
class SimUnit:
    """A unit, and seconds of one microbatch. The first unit of a list is the root, named "".

    forward_head_s, backward_head_s: of the root: norm, head and loss, after the blocks; and their backward, before the
    blocks'. What else it has is embedding: `forward_s`, before the blocks, and `backward_s`, after them.
    recompute_s: the part of backward that computes forward again; not counted in `backward_s`.
    gather: None if nothing of it is gathered. reduce: None if it has nothing to train.
    replica_sum: None without replicas. norm_s, update_s: once a step, its part of the gradients' norm and of the
    optimizer.
    input_s: that its input takes to host memory in forward, and back for backward; 0: it stays.
    pages_s: that the pages of its moments take from there for the update, and back; empty: they are on the device.
    has_backward: a gradient reaches its output. ends_with_input: one reaches its input, which tells the engine that its
    backward has ended; of others it learns that at the end of the whole backward.
    """

    name: str
    keep: Keep
    forward_s: float = 0.0
    recompute_s: float = 0.0
    backward_s: float = 0.0
    forward_head_s: float = 0.0
    backward_head_s: float = 0.0
    gather: Collective | None = None
    reduce: Collective | None = None
    replica_sum: Collective | None = None
    norm_s: float = 0.0
    update_s: float = 0.0
    pages_s: tuple[float, ...] = ()
    input_s: float = 0.0
    has_backward: bool = True
    ends_with_input: bool = True


@dataclass(frozen=True)
class Schedule:
    """What of a run's settings decides the order of events.

    keeps_full_grads: gradients of several microbatches are added up before they are reduced. shard_size: ranks over
    which the model is cut. steps_in_backward: a unit is updated when its gradient is complete. has_lanes: casts and
    sums run beside compute. meet_s: a small all-reduce, of which a step has two, and one more where `meets_at_end`.
    start_s: before anything.
    """

    microbatches: int
    prefetch_units: int
    shard_size: int
    keeps_full_grads: bool
    steps_in_backward: bool = False
    has_lanes: bool = False
    start_s: float = 0.0
    meet_s: float = 0.0
    meets_at_end: bool = False
