"""x + f ∘ (x - b), column by column, for factors 1 + f that are trained: IA3's vectors, DoRA's magnitudes.

What is trained is a `change` that starts at zero, f = gain ∘ change + offset. So the first forward is exact in any
format, and the change keeps its resolution in 16 bits, where 1 + f has steps of 2^-8. Products and sums are in fp32
inside of the operation, which makes no fp32 copy of x.

Backward needs x - b. In place, x is gone, and it is found again as (y - b) / (1 + f): nothing is kept but the result y,
which its readers keep anyway, as a rule. Where 1 + f is exactly zero the gradient of f is then taken for zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_ROWS_IN_CACHE = 128


@dataclass(frozen=True)
class Fixed:
    """Constants of one forward, (C,) in fp32: f = gain ∘ change + offset. `bias`: a frozen b (C,)."""

    gain: Tensor
    offset: Tensor
    bias: nn.Parameter | None


def stretch(x_NC: Tensor, change: nn.Parameter, fixed: Fixed | None = None) -> Tensor:
    """x + f ∘ (x - b), (N, C) in x's dtype. change: C values in any shape and float dtype. fixed: None is f = change,
    b = 0. Backward reads `change` and the bias as they are then."""
    return _Stretch.apply(x_NC, change, fixed, False)


def stretch_(x_NC: Tensor, change: nn.Parameter, fixed: Fixed | None = None) -> Tensor:
    """The same, in the place of x, which nobody else may need."""
    return _Stretch.apply(x_NC, change, fixed, True)


class _Stretch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NC: Tensor, change: nn.Parameter, fixed: Fixed | None, in_place: bool) -> Tensor:
        ctx.change, ctx.fixed, ctx.in_place = change, fixed, in_place
        y_NC = x_NC if in_place else torch.empty_like(x_NC)
        torch.addcmul(x_NC, _without_bias(x_NC, fixed), _factors(change, fixed).to(x_NC.dtype), out=y_NC)
        if in_place:
            ctx.mark_dirty(x_NC)
        ctx.save_for_backward((y_NC if in_place else x_NC) if ctx.needs_input_grad[1] else None)
        return y_NC

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_NC: Tensor) -> tuple[Tensor | None, ...]:
        (kept_NC,) = ctx.saved_tensors
        change, fixed = ctx.change, ctx.fixed
        factors_C = _factors(change, fixed)
        dx_NC = dchange = None
        if ctx.needs_input_grad[1]:
            dfactors_C = _column_sums(dy_NC, kept_NC, fixed)
            if ctx.in_place:
                stretched_C = 1.0 + factors_C.to(dfactors_C.dtype)
                dfactors_C = torch.where(stretched_C == 0.0, 0.0, dfactors_C / stretched_C)
            dchange_C = dfactors_C if fixed is None else dfactors_C * fixed.gain
            dchange = dchange_C.to(change.dtype).view(change.shape)
        if ctx.needs_input_grad[0]:
            dx_NC = torch.addcmul(dy_NC, dy_NC, factors_C.to(dy_NC.dtype))
        return dx_NC, dchange, None, None


def _factors(change: nn.Parameter, fixed: Fixed | None) -> Tensor:
    """f (C,)"""
    change_C = change.detach().view(-1)
    return change_C if fixed is None else torch.addcmul(fixed.offset, fixed.gain, change_C.to(fixed.gain.dtype))


def _without_bias(x_NC: Tensor, fixed: Fixed | None) -> Tensor:
    return x_NC if fixed is None or fixed.bias is None else x_NC - fixed.bias.to(x_NC.dtype)


def _column_sums(dy_NC: Tensor, x_NC: Tensor, fixed: Fixed | None) -> Tensor:
    """The sum over N of dy ∘ (x - b), (C,) in fp32 or fp64. On a CPU without a temporary as large as x."""
    rows = _ROWS_IN_CACHE if x_NC.device.type == "cpu" else max(1, len(x_NC))
    sums_C = torch.zeros(x_NC.shape[1], dtype=torch.promote_types(x_NC.dtype, torch.float32), device=x_NC.device)
    for dy_RC, x_RC in zip(dy_NC.split(rows), x_NC.split(rows), strict=True):
        sums_C += (dy_RC * _without_bias(x_RC, fixed)).sum(0, dtype=sums_C.dtype)
    return sums_C
