"""A unit: one module whose parameters are gathered and freed together, and the memory that it borrows for that.

Transitions, each asserted:

    SHARDED --start_gather--> GATHERING --wait_gather--> FULL --free--> SHARDED

Gradients go their own way beside it, because a reduction outlives the gathered parameters:

    CLOSED --open_gradients--> OPEN --start_reduce--> REDUCING --finish_reduce--> CLOSED
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minift.dist.process import World
from minift.fsdp.bucket import Bucket
from minift.fsdp.flat import ALIGN_BYTES
from minift.fsdp.streams import Lane, wait_for
from minift.fsdp.transport import DONE, Buffer, Pending, Transport
from minift.trace import Mark, Recorder

REDUCTIONS_IN_FLIGHT = 2
"""One buffer is being filled while the one before it is being reduced."""


class UnitState(enum.Enum):
    """What memory is alive for parameters, beside the shards (which always are)."""

    SHARDED = enum.auto()
    """Nothing. Parameters are placeholders."""
    GATHERING = enum.auto()
    """One gather buffer, being filled. Parameters are still placeholders."""
    FULL = enum.auto()
    """One gather buffer. Parameters are views of it."""


class GradState(enum.Enum):
    """What memory is alive for gradients, beside the gradient shards."""

    CLOSED = enum.auto()
    """Nothing."""
    OPEN = enum.auto()
    """One reduce buffer, into which backward writes."""
    REDUCING = enum.auto()
    """One reduce buffer, which other ranks may be reading."""


class Keep(enum.Enum):
    """How long gathered parameters stay."""

    UNTIL_FORWARD_ENDS = enum.auto()
    UNTIL_BACKWARD_ENDS = enum.auto()
    UNTIL_UPDATE = enum.auto()


class Ring:
    """A fixed number of equal buffers, allocated once and lent to the units in turn.

    Peak memory is `len(buffers) · num_bytes`, whatever the depth of the model. Buffers are handed out last in, first
    out, so that a short schedule keeps reusing the memory that is in cache.
    """

    def __init__(
        self, kind: str, buffers: list[Buffer], num_bytes: int, recorder: Recorder, scratch: Tensor | None = None
    ) -> None:
        self.kind = kind
        self.buffers = buffers
        self.scratch = scratch  # (len(buffers), n) fp32: a row goes with each buffer
        self.num_bytes = num_bytes
        self._free = list(buffers)
        self._recorder = recorder

    @property
    def has_free(self) -> bool:
        return len(self._free) > 0

    def acquire(self) -> Buffer:
        assert self._free, f"all {len(self.buffers)} {self.kind} buffers are in use: more than the policy allows"
        buffer = self._free.pop()
        buffer.acquire()
        self._recorder.change_level(self.kind, self.num_bytes)
        return buffer

    def release(self, buffer: Buffer) -> None:
        buffer.release()
        self._free.append(buffer)
        self._recorder.change_level(self.kind, -self.num_bytes)

    def scratch_of(self, buffer: Buffer) -> Tensor:
        """The row of `scratch` that goes with `buffer`."""
        assert self.scratch is not None
        return self.scratch[self.buffers.index(buffer)]

    def owns(self, tensor: Tensor) -> bool:
        """Whether `tensor` lies in one of the buffers."""
        address = tensor.untyped_storage().data_ptr()
        return any(b.memory.numel() > 0 and address == b.memory.untyped_storage().data_ptr() for b in self.buffers)


@dataclass(frozen=True)
class Links:
    """What all units of a model share: how they reach the other ranks, and who watches."""

    gather: Transport
    reduce: Transport
    replica: World
    gather_lane: Lane
    reduce_lane: Lane
    recorder: Recorder


class Unit:
    """One module's buckets and their state. Who calls what when is `hooks`' business."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        buckets: list[Bucket],
        keep: Keep,
        gather_ring: Ring,
        reduce_ring: Ring,
        links: Links,
    ) -> None:
        self.name = name
        self.module = module
        self.buckets = buckets
        self.trainable = [bucket for bucket in buckets if bucket.trainable]
        self.keep = keep
        self.state = UnitState.SHARDED
        self.grad_state = GradState.CLOSED
        self.gather_ring = gather_ring
        self.reduce_ring = reduce_ring
        self._links = links
        self._to_gather = [bucket for bucket in buckets if not bucket.resident]
        self.keeps_full_grads = any(bucket.keeps_full_grads for bucket in self.trainable)
        self.pending_backwards = 0
        """Forwards since the last backward, that a backward may still go through."""
        self.is_complete = False
        """The gradients of this step were summed up for good: one more backward would come too late."""
        self.reduces_alone = links.reduce.world.size == 1
        self.sums_once = links.replica.size > 1 or (self.keeps_full_grads and not self.reduces_alone)
        """Whether gradients are, in part, summed up once a step only, in the last microbatch."""
        self.takes_turns = reduce_ring.scratch is not None and bool(self.trainable)
        """Whether its gradients live only until the update that follows (policy.step_in_backward)."""
        self.replica_sent_bytes = 0
        """Sent to other replicas since the beginning: an all-reduce sends 2 (R - 1) / R of what it sums."""
        self._buffer: Buffer | None = None
        self._grad_buffer: Buffer | None = None
        self._gathering = self._reducing = DONE
        self._gather_mark: torch.cuda.Event | None = None
        self._reduce_mark: torch.cuda.Event | None = None
        # From when to when the lane was busy; until it was waited for, where a lane has no clock of its own.
        self._gather_time: tuple[Mark | None, Mark | None] = (None, None)
        self._reduce_time: tuple[Mark | None, Mark | None] = (None, None)

    # Parameters #

    def start_gather(self) -> None:
        """Borrow a buffer and start filling it with this unit's parameters."""
        self._assert_state(UnitState.SHARDED)
        self.state = UnitState.GATHERING
        if not self._to_gather:
            return
        self._buffer = self.gather_ring.acquire()
        with self._links.gather_lane.run():
            started = self._links.recorder.mark()
            fulls = [bucket.place(memory) for bucket, memory in self._pieces(self._buffer)]
            self._gathering = self._links.gather.all_gather(self._buffer, fulls)
            self._gather_time = started, self._links.gather_lane.clock(self._links.recorder)
        self._gather_mark = self._links.gather_lane.mark()

    def _pieces(self, buffer: Buffer) -> Iterator[tuple[Bucket, Tensor]]:
        """Where in `buffer` each bucket is gathered."""
        offset = 0
        for bucket in self._to_gather:
            yield bucket, buffer.memory[offset : offset + bucket.gather_bytes]
            offset += aligned(bucket.gather_bytes)

    def wait_gather(self) -> None:
        """Parameters become readable."""
        self._assert_state(UnitState.GATHERING)
        if self._to_gather:
            recorder = self._links.recorder
            with recorder.during("compute", "wait", self.name):
                self._gathering.wait()
                wait_for(self._gather_mark)
            recorder.span("all-gather", "all-gather", self.name, *self._gather_time)
            for bucket in self._to_gather:
                bucket.expose()
        self._gathering = DONE
        self.state = UnitState.FULL

    def free(self) -> None:
        """Return the buffer; parameters become placeholders."""
        self._assert_state(UnitState.FULL)
        for bucket in self._to_gather:
            bucket.hide()
        if self._buffer is not None:
            self.gather_ring.release(self._buffer)
            self._buffer = None
        self.state = UnitState.SHARDED

    # Gradients #

    @property
    def lacks_reduce_buffer(self) -> bool:
        """Whether `open_gradients` has to wait for a buffer that is lent to another unit."""
        borrows = len(self.trainable) > 0 and not self.keeps_full_grads and self.grad_state is GradState.CLOSED
        return borrows and not self.reduce_ring.has_free

    def open_gradients(self) -> None:
        """Lay slots on the parameters, in a borrowed buffer, for backward to write gradients into."""
        if self.grad_state is GradState.OPEN or not self.trainable:
            return
        assert self.grad_state is GradState.CLOSED, f"unit {self.name!r} is still being reduced"
        if not self.keeps_full_grads:
            self._grad_buffer = self.reduce_ring.acquire()
        offset = 0
        for bucket in self.trainable:
            memory = None
            if self._grad_buffer is not None:
                memory = self._grad_buffer.memory[offset : offset + bucket.reduce_bytes]
                offset += aligned(bucket.reduce_bytes)
            bucket.open_slots(memory)
        self.grad_state = GradState.OPEN

    def start_reduce(self, is_last_microbatch: bool) -> None:
        """Begin to sum the gradients of this backward over the shard ranks, into the gradient shards."""
        assert self.grad_state is GradState.OPEN, f"unit {self.name!r} has no gradients to reduce"
        self.grad_state = GradState.REDUCING
        fulls = [bucket.close_slots() for bucket in self.trainable]
        is_sent = not self.keeps_full_grads or (is_last_microbatch and not self.reduces_alone)
        self._make_grads()
        with self._links.reduce_lane.run():
            started = self._links.recorder.mark() if is_sent else None
            if self._grad_buffer is not None:
                accumulate = not self.trainable[0].grad_is_empty
                outs = [bucket.grad for bucket in self.trainable]
                self._reducing = self._links.reduce.reduce_scatter(self._grad_buffer, fulls, outs, accumulate)
            elif is_last_microbatch:
                pendings = [
                    self._links.reduce.reduce_scatter(bucket.kept_buffer, [full], [bucket.grad], False)
                    for bucket, full in zip(self.trainable, fulls, strict=True)
                ]
                self._reducing = Pending(finish=lambda: [pending.wait() for pending in pendings])
            self._reduce_time = started, self._links.reduce_lane.clock(self._links.recorder)
        self._reduce_mark = self._links.reduce_lane.mark()
        for bucket in self.trainable:
            bucket.grad_is_empty = False

    def finish_reduce(self) -> None:
        """The gradient shards are readable, and the buffer is free again."""
        assert self.grad_state is GradState.REDUCING
        self._reducing.wait()
        is_on_host = self.trainable[0].grad.device.type == "cpu"  # offloaded, where they are read by the host
        wait_for(self._reduce_mark, on_host=is_on_host)
        self._reducing = DONE
        self._links.recorder.span("reduce-scatter", "reduce-scatter", self.name, *self._reduce_time)
        self._give_buffer_back()

    def _make_grads(self) -> None:
        """Memory for the gradient shards. If they live only until the update that follows, it goes with the reduce
        buffer."""
        start = 0
        for bucket in self.trainable:
            if self.takes_turns:
                buffer = self._grad_buffer or self.reduce_ring.buffers[0]
                bucket.use_scratch(self.reduce_ring.scratch_of(buffer)[start:])
                start += bucket.layout.shard_numel
            bucket.have_grads()

    def zero_gradients(self) -> None:
        """No backward of this step came here: the gradient is zero. Nothing may be under way."""
        self._make_grads()
        for bucket in self.trainable:
            bucket.grad.zero_()
            bucket.grad_is_empty = False

    def clear_gradients(self) -> None:
        """Forget all gradients, also those of a forward whose backward has not come."""
        assert self.grad_state is not GradState.REDUCING, f"unit {self.name!r} is being reduced"
        if self.grad_state is GradState.OPEN:
            self._close_gradients()
        for bucket in self.trainable:
            bucket.clear_grads()
        self.is_complete = False

    def _close_gradients(self) -> None:
        for bucket in self.trainable:
            bucket.close_slots()
        self._give_buffer_back()

    def _give_buffer_back(self) -> None:
        if self._grad_buffer is not None:
            self.reduce_ring.release(self._grad_buffer)
            self._grad_buffer = None
        self.grad_state = GradState.CLOSED

    def start_replica_sum(self) -> list[dist.Work]:
        """Begin to add up the gradient shards of all replicas (HSDP, DDP), in place."""
        self.is_complete = True
        replica = self._links.replica
        if replica.size == 1:
            return []
        grads = [bucket.grad for bucket in self.trainable]
        self.replica_sent_bytes += 2 * sum(grad.nbytes for grad in grads) * (replica.size - 1) // replica.size
        return [dist.all_reduce(grad, group=replica.group, async_op=True) for grad in grads]

    # After an exception #

    def abort_gather(self) -> None:
        """Back to SHARDED."""
        if self.state is UnitState.GATHERING:
            self._gathering.wait()  # the buffer must not be written any more when it is lent again
            self._gathering = DONE
            self.state = UnitState.FULL
        if self.state is UnitState.FULL:
            self.free()

    def abort(self) -> None:
        """Back to SHARDED and CLOSED from wherever a step was left."""
        self.abort_gather()
        if self.grad_state is GradState.OPEN:
            self._close_gradients()
        if self.grad_state is GradState.REDUCING:
            self.finish_reduce()
        self.pending_backwards = 0

    def _assert_state(self, expected: UnitState) -> None:
        assert self.state is expected, f"unit {self.name!r} is {self.state.name}, expected {expected.name}"


def aligned(num_bytes: int) -> int:
    """`num_bytes` rounded up to where the next bucket of a buffer may start."""
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES
