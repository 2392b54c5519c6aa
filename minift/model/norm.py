"""RMSNorm whose backward reads the weight again instead of saving it (see project.py for why).

Paper: Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4. The arithmetic, and the rounding to the input's dtype before the
weight is applied, live in `minift.ops.norm`; this file only ties it to autograd and to a Parameter.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minift.ops.norm import rms_norm, rms_norm_backward


class _RMSNorm(torch.autograd.Function):
    """The result, and x again: what reads x beside the norm reads this, and its gradient is added here."""

    @staticmethod
    def forward(ctx, x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x_ND = x.reshape(-1, x.shape[-1])
        y_ND, rstd_N = rms_norm(x_ND, weight_D, eps)
        ctx.weight = weight_D
        ctx.save_for_backward(x_ND, rstd_N)
        ctx.set_materialize_grads(False)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(x)
        return y_ND.view(x.shape), x

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor | None, dresidual: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        if dy is None:
            return dresidual, None, None
        x_ND, rstd_N = ctx.saved_tensors
        dy_ND, dresidual_ND = (None if of is None else of.reshape(-1, of.shape[-1]) for of in (dy, dresidual))
        dx_ND, dweight_D = rms_norm_backward(dy_ND, x_ND, ctx.weight, rstd_N, dresidual_ND, ctx.needs_input_grad[1])
        if dweight_D is not None:
            dweight_D = dweight_D.to(ctx.weight.dtype)
        return dx_ND.view(dy.shape), dweight_D, None


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight over the last dim; x of any leading shape, result in x.dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)[0]

    def with_residual(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(y, x). Whoever reads that x, and not the argument, has its gradient added to the norm's in one pass over
        memory instead of two."""
        return _RMSNorm.apply(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
