"""Where the gradient of a parameter is to be put: memory lent by whoever reduces gradients, filled by whoever
computes them.

FSDP lays a slot on a parameter for the time of its backward: a view of the very buffer that a reduce-scatter sends. A
function that knows of slots writes its product there, by the GEMM itself where that can make the slot's dtype, and
returns no gradient to autograd. Everything else may ignore slots: FSDP moves an ordinary `.grad` into the slot as soon
as autograd has it.

A slot takes one gradient per use of the parameter; the second is added to the first.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from minift.ops.matmul import addmm_, adds_up_in, mm

ADD_BYTES = 1 << 20  # stays in cache


class GradSlot:
    """tensor: of the parameter's shape, in the dtype in which gradients are kept until they are reduced."""

    class State(enum.Enum):
        EMPTY = enum.auto()
        """`tensor` holds nothing of worth."""
        CLAIMED = enum.auto()
        """A forward has put something there that its backward will finish; nobody else may touch it."""
        FULL = enum.auto()
        """`tensor` is the sum of the gradients so far."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.state = GradSlot.State.EMPTY
        self._claimed: Tensor | None = None  # the memory as it was handed out
        self._waiting: Tensor | None = None  # came while the memory was claimed

    def add(self, grad: Tensor) -> None:
        """Take `grad` (of the parameter's shape, any float dtype)."""
        if self.state is GradSlot.State.CLAIMED:
            self._waiting = grad.clone() if self._waiting is None else self._waiting + grad
        elif self.state is GradSlot.State.FULL:
            _add_(self.tensor, grad)
        else:
            self.tensor.copy_(grad)
            self.state = GradSlot.State.FULL

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """Take a @ b; without a temporary if a product of their dtype can be added up in the slot's."""
        if self.state is GradSlot.State.CLAIMED or not adds_up_in(self.tensor.dtype, a.dtype, a.is_cuda):
            self.add(mm(a, b))
        elif self.state is GradSlot.State.FULL:
            addmm_(self.tensor, a, b)
        else:
            mm(a, b, out=self.tensor)
            self.state = GradSlot.State.FULL

    def add_rows(self, rows_U: Tensor, values_UD: Tensor) -> None:
        """Take a gradient that is zero but for the distinct rows `rows_U` (int64)."""
        if self.state is GradSlot.State.CLAIMED:
            self.add(torch.zeros_like(self.tensor).index_copy_(0, rows_U, values_UD.to(self.tensor.dtype)))
            return
        self._fill()
        self.tensor[rows_U] = (self.tensor[rows_U] + values_UD).to(self.tensor.dtype)

    def add_repeated_rows(self, rows_N: Tensor, values_ND: Tensor) -> None:
        """Take a gradient that is the sum of `values_ND` at rows `rows_N` (int64), which may repeat. Meant for a GPU,
        which adds a row's values in the order in which they come, and whose host waits for nothing.

        Values go straight to a slot of fp32. One of 16 bits gets a whole gradient, which torch's CUDA kernel sums up in
        fp32, of up to 3072 rows 32 at a time: `index_put_` rounds after each value, and the sum of a frequent row
        would stop growing."""
        if self.state is GradSlot.State.CLAIMED or self.tensor.dtype.itemsize < 4:
            self.add(torch.ops.aten.embedding_dense_backward(values_ND, rows_N, len(self.tensor), -1, False))
            return
        self._fill()
        self.tensor.index_put_((rows_N,), values_ND.to(self.tensor.dtype), accumulate=True)

    def claim(self, dtype: torch.dtype) -> Tensor | None:
        """The memory, for a gradient in the making; None if somebody has it already or its dtype is another."""
        if self.state is not GradSlot.State.EMPTY or self.tensor.dtype != dtype:
            return None
        self.state = GradSlot.State.CLAIMED
        self._claimed = self.tensor.detach()
        return self._claimed

    def holds(self, claimed: Tensor) -> bool:
        """Whether `claimed`, the very tensor that `claim` returned, still is the gradient in the making."""
        return self.state is GradSlot.State.CLAIMED and self._claimed is claimed

    def finish(self, claimed: Tensor) -> None:
        """What was claimed is a gradient now."""
        assert self.holds(claimed)
        self.state = GradSlot.State.FULL
        self._take_waiting()

    def close(self) -> bool:
        """No more gradients will come; whether any did. If none did, the memory is zeroed. A claim whose backward never
        ran is void."""
        if self.state is GradSlot.State.CLAIMED:
            self.state = GradSlot.State.EMPTY
            self._take_waiting()
        if self.state is GradSlot.State.EMPTY:
            self.tensor.zero_()
        return self.state is GradSlot.State.FULL

    def clear(self) -> None:
        """Forget what came."""
        self.state = GradSlot.State.EMPTY
        self._waiting = None

    def _fill(self) -> None:
        """With zeros, if `tensor` holds nothing of worth, so that it is a sum that can be added to."""
        if self.state is GradSlot.State.EMPTY:
            self.tensor.zero_()
            self.state = GradSlot.State.FULL

    def _take_waiting(self) -> None:
        if self._waiting is not None:
            self.add(self._waiting)
            self._waiting = None


def _add_(total: Tensor, grad: Tensor) -> None:
    """total += grad. By pieces where torch would first make a copy of `grad` in total's dtype: on a CPU."""
    if total.dtype == grad.dtype or total.is_cuda or total.dim() == 0:
        total.add_(grad)
        return
    num_rows = max(1, ADD_BYTES // max(1, total[:1].nbytes))
    for rows, grad_rows in zip(total.split(num_rows), grad.split(num_rows), strict=True):
        rows.add_(grad_rows)


def slot_of(parameter: Tensor) -> GradSlot | None:
    """The slot that lies on `parameter` at this moment."""
    return parameter.__dict__.get("grad_slot")


def lay_slot(parameter: Tensor, slot: GradSlot | None) -> None:
    """Put `slot` on `parameter`, or take away what lies there."""
    parameter.__dict__["grad_slot"] = slot


def claim_slot(parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Memory for a gradient of `parameter` in the making, if there is a slot for it: see `GradSlot.claim`."""
    slot = slot_of(parameter)
    return None if slot is None else slot.claim(dtype)


@contextmanager
def without_slots(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Inside of the block autograd gets every gradient, as if there were no slots."""
    slots = [slot_of(parameter) for parameter in parameters]
    for parameter in parameters:
        lay_slot(parameter, None)
    try:
        yield
    finally:
        for parameter, slot in zip(parameters, slots, strict=True):
            lay_slot(parameter, slot)


def deliver_product(parameter: Tensor, a: Tensor, b: Tensor) -> Tensor | None:
    """The gradient a @ b of `parameter`, for a backward to return: None if it went into a slot."""
    slot = slot_of(parameter)
    if slot is None:
        return mm(a, b)
    slot.add_product(a, b)
    return None


def gradient_memory(parameter: Tensor) -> Tensor:
    """Where to write the whole gradient of `parameter` before it is given to `deliver`: the slot's memory, or fresh."""
    slot = slot_of(parameter)
    claimed = None if slot is None else slot.claim(slot.tensor.dtype)
    return torch.empty_like(parameter) if claimed is None else claimed


def deliver(parameter: Tensor, gradient: Tensor) -> Tensor | None:
    """`gradient`, for a backward to return: None if it went into a slot."""
    slot = slot_of(parameter)
    if slot is None:
        return gradient
    if slot.holds(gradient):
        slot.finish(gradient)
    else:
        slot.add(gradient)
    return None
