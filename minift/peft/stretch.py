"""x + f ∘ (x - b), column by column, for factors 1 + f that are trained: IA3's vectors, DoRA's magnitudes.

What is trained is a `change` that starts at zero, f = gain ∘ change + offset. So the first forward is exact in any
format, and the change keeps its resolution in 16 bits, where 1 + f has steps of 2^-8. Products and sums are in fp32
inside of the operation, which makes no fp32 copy of x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Fixed:
    """Constants of one forward, (C,) in fp32: f = gain ∘ change + offset. `bias`: a frozen b (C,)."""

    gain: Tensor
    offset: Tensor
    bias: nn.Parameter | None


def stretch(x_NC: Tensor, change: nn.Parameter, fixed: Fixed | None = None) -> Tensor:
    """x + f ∘ (x - b), (N, C) in x's dtype. change: C values in any shape and float dtype. fixed: None is f = change,
    b = 0. Backward reads `change` and the bias as they are then."""
    return _Stretch.apply(x_NC, change, fixed)


class _Stretch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NC: Tensor, change: nn.Parameter, fixed: Fixed | None) -> Tensor:
        ctx.change, ctx.fixed = change, fixed
        ctx.save_for_backward(x_NC if ctx.needs_input_grad[1] else None)
        return torch.addcmul(x_NC, _without_bias(x_NC, fixed), _factors(change, fixed).to(x_NC.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_NC: Tensor) -> tuple[Tensor | None, ...]:
        (x_NC,) = ctx.saved_tensors
        change, fixed = ctx.change, ctx.fixed
        dx_NC = dchange = None
        if ctx.needs_input_grad[0]:
            dx_NC = torch.addcmul(dy_NC, dy_NC, _factors(change, fixed).to(dy_NC.dtype))
        if ctx.needs_input_grad[1]:
            products_NC = dy_NC * _without_bias(x_NC, fixed)
            dfactors = products_NC.sum(0, dtype=torch.promote_types(dy_NC.dtype, torch.float32))
            dchange = dfactors if fixed is None else dfactors * fixed.gain
            dchange = dchange.to(change.dtype).view(change.shape)
        return dx_NC, dchange, None


def _factors(change: nn.Parameter, fixed: Fixed | None) -> Tensor:
    """f (C,)"""
    change_C = change.detach().view(-1)
    return change_C if fixed is None else torch.addcmul(fixed.offset, fixed.gain, change_C.to(fixed.gain.dtype))


def _without_bias(x_NC: Tensor, fixed: Fixed | None) -> Tensor:
    return x_NC if fixed is None or fixed.bias is None else x_NC - fixed.bias.to(x_NC.dtype)
