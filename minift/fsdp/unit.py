"""A unit: one module whose parameters are gathered and freed together, and the memory that gathering borrows.

Transitions, each asserted:

    SHARDED --start_gather--> GATHERING --wait_gather--> FULL --free--> SHARDED
                                                          |  ^
                                                    reduce|  |(gradients are in their shards)
                                                          v  |
                                                        REDUCING
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor, nn

from minift.fsdp import collectives
from minift.fsdp.flat import ALIGN_BYTES, Bucket


class UnitState(enum.Enum):
    """What memory is alive, beside the shards (which always are)."""

    SHARDED = enum.auto()
    """Nothing. Parameters are placeholders."""
    GATHERING = enum.auto()
    """One ring slot, being filled. Parameters are still placeholders."""
    FULL = enum.auto()
    """One ring slot. Parameters are views of it."""
    REDUCING = enum.auto()
    """One ring slot and the gradient buffer. Parameters are views of the slot; their `.grad` has been taken."""


class Ring:
    """A fixed number of equal byte buffers, allocated once and lent to the units in turn.

    Peak memory of gathered parameters is `num_slots · slot_bytes`, whatever the depth of the model. Slots are handed
    out last in, first out, so that a short schedule keeps reusing the buffer that is in cache.
    """

    def __init__(self, num_slots: int, slot_bytes: int, device: torch.device) -> None:
        self.slot_bytes = slot_bytes
        self.slots = [torch.empty(slot_bytes, dtype=torch.uint8, device=device) for _ in range(num_slots)]
        self._free = list(self.slots)

    def acquire(self) -> Tensor:
        assert self._free, f"all {len(self.slots)} ring slots are in use: more units are FULL than the policy allows"
        return self._free.pop()

    def release(self, slot: Tensor) -> None:
        self._free.append(slot)

    def owns(self, tensor: Tensor) -> bool:
        """Whether `tensor` lies in one of the slots."""
        address = tensor.untyped_storage().data_ptr()
        return any(slot.numel() > 0 and address == slot.data_ptr() for slot in self.slots)


class Unit:
    """One module's buckets and their state. Who calls what when is `hooks`' business."""

    def __init__(self, name: str, module: nn.Module, buckets: list[Bucket], ring: Ring, grad_buffer: Tensor) -> None:
        self.name = name
        self.module = module
        self.buckets = buckets
        self.state = UnitState.SHARDED
        self.without_grad = {name for bucket in buckets if bucket.trainable for name in bucket.params}
        """Trainable parameters that no backward has given a gradient yet."""
        self._ring = ring
        self._grad_buffer = grad_buffer  # 1-D, reduce dtype, shared by all units
        self._slot: Tensor | None = None
        self._pending: list[collectives.Pending] = []

    def start_gather(self) -> None:
        """Borrow a slot and start one all-gather per bucket."""
        self._assert_state(UnitState.SHARDED)
        self._slot = self._ring.acquire()
        self.state = UnitState.GATHERING
        offset = 0
        for bucket in self.buckets:
            self._pending.append(bucket.start_gather(self._slot[offset : offset + bucket.full_bytes]))
            offset += aligned(bucket.full_bytes)

    def wait_gather(self) -> None:
        """Parameters become readable."""
        self._assert_state(UnitState.GATHERING)
        for pending in self._pending:
            pending.wait()
        self._pending.clear()
        for bucket in self.buckets:
            bucket.expose()
        self.state = UnitState.FULL

    def reduce(self) -> None:
        """Sum the gradients of this backward over the ranks into the gradient shards."""
        self._assert_state(UnitState.FULL)
        self.state = UnitState.REDUCING
        for bucket in self.buckets:
            if bucket.trainable:
                full_grad = self._grad_buffer[: bucket.layout.full_numel]
                self.without_grad -= bucket.pack_grads(full_grad)
                collectives.reduce_scatter(full_grad, bucket.world).wait()
                bucket.accumulate(full_grad)
        self.state = UnitState.FULL

    def free(self) -> None:
        """Return the slot; parameters become placeholders."""
        self._assert_state(UnitState.FULL)
        for bucket in self.buckets:
            bucket.hide()
        assert self._slot is not None
        self._ring.release(self._slot)
        self._slot = None
        self.state = UnitState.SHARDED

    def abort(self) -> None:
        """From any state back to SHARDED, after an exception somewhere inside a step."""
        if self.state is UnitState.SHARDED:
            return
        for pending in self._pending:
            pending.wait()  # the slot must not be written any more when it is lent again
        self._pending.clear()
        self.state = UnitState.FULL
        self.free()

    def _assert_state(self, expected: UnitState) -> None:
        assert self.state is expected, f"unit {self.name!r} is {self.state.name}, expected {expected.name}"


def aligned(num_bytes: int) -> int:
    """`num_bytes` rounded up to where the next bucket of a slot may start."""
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES
