"""y = x Wᵀ + b, for one projection or several that read the same x, with or without low-rank updates.

`project` is the differentiable operation on projections, one step of autograd, however weights are stored and
however many there are. Projections that share their input (q, k, v; gate, up) save it once; their updates go through
the rank in one product (`low_rank`); and the gradients for x are added up by the matrix products themselves, where
autograd would sum tensors as wide as x. Saved for backward are x, the very tensor that its producer and its other
readers hold, if a gradient is made of it, and the narrow products of the updates; nothing of the output's width.
`project_gated` is the same for x = silu(gate) · up, which it makes, and makes again where memory counts more than time.

It is written so that weights may move between forward and backward. Under FSDP a Parameter's `.data` is a view of a
gather buffer that other blocks overwrite before backward comes. Whatever autograd saves of it would then be another
block's weight. So `project` keeps the *Parameter objects* and reads `.data` again in backward, when their unit has
gathered it anew. A weight's gradient goes straight to where it will be reduced from, if there is such a place
(`grad_slot`).

`LinearBase` is what dense, quantized and adapter-wrapped projections share. A new way to store a weight is a subclass
that says how to multiply with it, `product` and `product_dx`, and needs to know nothing of autograd or adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minift.grad_slot import deliver_product
from minift.model.low_rank import LowRank, Updates
from minift.ops.matmul import addmm_, linear, mm
from minift.ops.swiglu import swiglu_backward_, swiglu_forward


class LinearBase(nn.Module):
    """A projection from `in_features` to `out_features`, however its weight is stored.

    A subclass that stores a weight has a `bias` and writes `product`, `product_dx`, `dense_weight` and, to be merged
    into, `storing`. One that wraps another projection writes `dense_weight` and `parts`, perhaps `after`, or its own
    `forward` where these cannot tell.
    """

    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        return project(x, self)[0]

    def parts(self) -> tuple[LinearBase, tuple[LowRank, ...]] | None:
        """A projection with `product`s and updates, of whose sum `after` makes this one; None: only `forward` knows."""
        return self, ()

    def after(self, out_NO: Tensor) -> Tensor:
        """This projection's output, a differentiable function of the sum of its parts: the sum itself, as a rule."""
        return out_NO

    @property
    def has_after(self) -> bool:
        """Whether there is such a function, which may read the sum."""
        return type(self).after is not LinearBase.after

    def product(self, x_NI: Tensor, add_to_NO: Tensor | None = None) -> Tensor:
        """x Wᵀ + b, a fresh (N, out_features) in x's dtype; or x Wᵀ added in place to `add_to_NO`, which has b in it
        and is returned. Runs without autograd, like the next."""
        raise NotImplementedError

    def product_dx(self, dy_NO: Tensor, add_to_NI: Tensor | None = None) -> Tensor:
        """dy W: a fresh (N, in_features), or added to `add_to_NI` in place, which is returned."""
        raise NotImplementedError

    def dense_parameter(self) -> nn.Parameter | None:
        """W, where it is one dense parameter and may be trained: its gradient is dyᵀ x."""
        return None

    def dense_weight(self) -> Tensor:
        """The weight (out_features, in_features) without gradient history: itself where it is dense, else a copy."""
        raise NotImplementedError

    def weight_slices(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows in `dtype`) of the weight from top to bottom, as many at a time as a cache holds; without
        gradient history, and each good until the next is asked for."""
        raise NotImplementedError

    def storing(self, weight: Tensor) -> LinearBase:
        """A projection like this one, with the same bias, that holds `weight` (any float dtype), frozen and rounded to
        this one's format."""
        raise NotImplementedError


class Linear(LinearBase):
    """Dense projection; parameters are named as in `nn.Linear` and start uninitialised."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    def product(self, x_NI: Tensor, add_to_NO: Tensor | None = None) -> Tensor:
        if add_to_NO is None:
            return linear(x_NI, self.weight, self.bias)
        return addmm_(add_to_NO, x_NI, self.weight.t())

    def product_dx(self, dy_NO: Tensor, add_to_NI: Tensor | None = None) -> Tensor:
        return mm(dy_NO, self.weight) if add_to_NI is None else addmm_(add_to_NI, dy_NO, self.weight)

    def dense_parameter(self) -> nn.Parameter:
        return self.weight

    def dense_weight(self) -> Tensor:
        return self.weight.detach()

    def weight_slices(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        weight = self.weight.detach()
        rows = self.out_features if weight.dtype == dtype else rows_in_cache(weight.shape, dtype, weight.device)
        for start in range(0, self.out_features, rows):
            yield start, weight[start : start + rows].to(dtype)

    def storing(self, weight: Tensor) -> Linear:
        return Linear.holding(weight.to(self.weight.dtype), self.bias)

    @staticmethod
    def holding(weight: Tensor, bias: nn.Parameter | None) -> Linear:
        """A projection with these two, themselves, the weight frozen."""
        with torch.device("meta"):
            linear = Linear(weight.shape[1], weight.shape[0])
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = bias
        return linear

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, bias={self.bias is not None}"


def rows_in_cache(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> int:
    """How many rows of a weight (out, in) to convert at a time: what fits a cache, or keeps a GPU busy."""
    slice_bytes = 1 << 20 if device.type == "cpu" else 64 << 20
    return min(shape[0], max(1, slice_bytes // (shape[1] * dtype.itemsize)))


def project(x: Tensor, *projections: LinearBase) -> list[Tensor]:
    """[projection(x) for projection in projections], as one operation if all of them have `parts`.

    x (..., in_features) -> each (..., out_features), in x's dtype, which is the stored weights'; the factors of updates
    may have another. Gradients come in the dtype of their parameter. Backward reads parameters as they are *then*.
    """
    call = _Call.of(projections)
    if call is None:
        return [projection(x) for projection in projections]
    x_NI = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    sums = _Project.apply(x_NI, None, call, *call.parameters())
    outs = [projection.after(sum_NO) for projection, sum_NO in zip(projections, sums, strict=True)]
    return outs if x.ndim == 2 else [out_NO.view(*x.shape[:-1], out_NO.shape[-1]) for out_NO in outs]


def project_gated(
    gate_NI: Tensor, up_NI: Tensor, projection: LinearBase, keeps_product: bool, result_is_read: bool
) -> Tensor:
    """projection(silu(gate) · up), (N, out_features), as one operation, for a projection with `parts`.

    Like that, the gradient of gate takes the place of that of the product: one tensor less of a model's greatest width,
    at the moment when there are most of them. keeps_product: False: backward makes silu(gate) · up again.
    result_is_read: False: the result's values are left out, unless the projection itself reads them.
    """
    call = _Call.of([projection], keeps_product, result_is_read)
    assert call is not None, f"{type(projection).__name__} has no parts"
    return projection.after(_Project.apply(gate_NI, up_NI, call, *call.parameters())[0])


@dataclass(frozen=True)
class _Call:
    """What one call multiplies with, and how."""

    bases: Sequence[LinearBase]
    updates: Sequence[tuple[LowRank, ...]]
    keeps_product: bool
    result_is_read: bool

    @staticmethod
    def of(projections: Sequence[LinearBase], keeps_product: bool = True, result_is_read: bool = True) -> _Call | None:
        """None if one of them has no `parts`."""
        parts = [projection.parts() for projection in projections]
        if None in parts:
            return None
        reads_sum = any(projection.has_after for projection in projections)
        bases, updates = zip(*parts, strict=True)
        return _Call(bases, updates, keeps_product, result_is_read or reads_sum)

    def parameters(self) -> list[nn.Parameter | None]:
        """W, b of each projection, A, B of each update."""
        parameters = [parameter for base in self.bases for parameter in (base.dense_parameter(), base.bias)]
        return parameters + [factor for of_one in self.updates for update in of_one for factor in (update.A, update.B)]


class _Project(torch.autograd.Function):
    """Its inputs are x and None, or gate and up, of which it makes x; then the call and its parameters or Nones."""

    @staticmethod
    def forward(
        ctx, x_NI: Tensor, up_NI: Tensor | None, call: _Call, *parameters: nn.Parameter | None
    ) -> tuple[Tensor, ...]:
        ctx.call, ctx.updates, ctx.is_gated = call, Updates(call.updates), up_NI is not None
        gate_NI = x_NI
        if ctx.is_gated:
            x_NI = swiglu_forward(gate_NI, up_NI)
        hidden_NR = ctx.updates.hidden(x_NI)
        if call.result_is_read:
            sums = ctx.updates.out(hidden_NR, [base.bias for base in call.bases])  # see [Note: updates first]
            outs = [base.product(x_NI, sums.get(index)) for index, base in enumerate(call.bases)]
        else:
            outs = [x_NI.new_zeros(()).expand(len(x_NI), base.out_features) for base in call.bases]
        needs_W, _, needs_A, needs_B = ctx.needs = _Project.needs(ctx)
        ctx.needs_dx = any(ctx.needs_input_grad[:2])
        reads_inputs = ctx.reads_x = any(needs_W) or any(needs_A)
        product_NI = ctx.product_NI = None
        if ctx.is_gated:
            reads_inputs = ctx.needs_dx or (ctx.reads_x and not call.keeps_product)
            if ctx.reads_x and call.keeps_product:
                # What gate and up can make again is given away by the first backward, while it still needs memory.
                product_NI, ctx.product_NI = (None, x_NI) if reads_inputs else (x_NI, None)
        ctx.save_for_backward(
            *((gate_NI, up_NI) if reads_inputs else (None, None)), hidden_NR if any(needs_B) else None, product_NI
        )
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *douts: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, up_NI, hidden_NR, product_NI = ctx.saved_tensors
        gate_NI = x_NI
        if ctx.is_gated:
            x_NI, ctx.product_NI = product_NI if ctx.product_NI is None else ctx.product_NI, None
            if x_NI is None and ctx.reads_x:
                x_NI = swiglu_forward(gate_NI, up_NI)
        bases, (needs_W, needs_b, needs_A, needs_B) = ctx.call.bases, ctx.needs
        gradients: list[Tensor | None] = []
        for base, dout_NO, needs_dW, needs_db in zip(bases, douts, needs_W, needs_b, strict=True):
            gradients.append(deliver_product(base.dense_parameter(), dout_NO.t(), x_NI) if needs_dW else None)
            gradients.append(dout_NO.sum(0) if needs_db else None)
        needs_dhidden = ctx.needs_dx or any(needs_A)
        dhidden_NR, of_B = ctx.updates.dhidden_and_gradients_of_B(douts, hidden_NR, needs_dhidden, needs_B)
        of_A: Sequence[Tensor | None] = [None] * len(of_B)
        dx_NI = dup_NI = None
        if needs_dhidden:
            of_A = ctx.updates.gradients_of_A(dhidden_NR, x_NI, needs_A)
            if ctx.needs_dx:
                dx_NI = ctx.updates.dx(dhidden_NR)
                for base, dout_NO in zip(bases, douts, strict=True):
                    dx_NI = base.product_dx(dout_NO, dx_NI)
        for pair in zip(of_A, of_B, strict=True):
            gradients += pair
        del x_NI, product_NI  # the product goes before the gradient of up comes
        if ctx.is_gated and ctx.needs_dx:
            dx_NI, dup_NI = swiglu_backward_(dx_NI, gate_NI, up_NI)
        return dx_NI, dup_NI, None, *gradients

    @staticmethod
    def needs(ctx) -> tuple[tuple[bool, ...], ...]:
        """Which of the W, b, A and B need a gradient."""
        _, _, _, *needs = ctx.needs_input_grad
        border = 2 * len(ctx.call.bases)
        return tuple(needs[:border:2]), tuple(needs[1:border:2]), tuple(needs[border::2]), tuple(needs[border + 1 :: 2])
