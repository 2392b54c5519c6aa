"""y = x Wᵀ + b, written so that the weight may move between forward and backward.

Under FSDP a Parameter's `.data` is a view of a gather buffer that other blocks overwrite before backward comes.
Whatever autograd saves of it would then be another block's weight. So `linear` keeps the *Parameter object* and reads
`.data` again in backward, when its unit has gathered it anew; the input is saved only if the weight is trained. The
weight's gradient goes straight to where it will be reduced from, if there is such a place (`grad_slot`).

`LinearBase` is what quantized and adapter-wrapped projections share: code that wraps projections asks for nothing more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minift.grad_slot import deliver_product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad
        (x,) = ctx.saved_tensors
        dx = dy @ ctx.weight if needs_dx else None
        dy_NO = dy.reshape(-1, dy.shape[-1]) if needs_dweight or needs_dbias else None
        dweight = deliver_product(ctx.weight, dy_NO.t(), x.reshape(-1, x.shape[-1])) if needs_dweight else None
        dbias = dy_NO.sum(0) if needs_dbias else None
        return dx, dweight, dbias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) -> (..., out) with weight (out, in) and bias (out,), all of one dtype; gradients come in that dtype.

    Backward reads `weight` as it is *then*; see the module docstring.
    """
    return _Linear.apply(x, weight, bias)


class LinearBase(nn.Module):
    """A projection from `in_features` to `out_features`, however its weight is stored."""

    in_features: int
    out_features: int

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        raise NotImplementedError

    def dense_weight(self) -> Tensor:
        """The weight (out_features, in_features) without gradient history: itself where it is dense, else a copy."""
        raise NotImplementedError


class Linear(LinearBase):
    """Dense projection; parameters are named as in `nn.Linear` and start uninitialised."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def dense_weight(self) -> Tensor:
        return self.weight.detach()

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, bias={self.bias is not None}"
