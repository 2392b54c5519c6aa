"""Matrix products with an NF4 weight: y = x W^T, and the gradient dx = dy W. Not differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from minift.ops.nf4 import Nf4, dequantize_nf4


@torch.no_grad()
def nf4_linear(x_TD: Tensor, nf4: Nf4) -> Tensor:
    """x (T, in) times the transpose of nf4 (out, in): (T, out) in x's dtype."""
    return x_TD @ dequantize_nf4(nf4, x_TD.dtype).view(nf4.shape).t()


@torch.no_grad()
def nf4_linear_dx(dy_TF: Tensor, nf4: Nf4) -> Tensor:
    """dy (T, out) times nf4 (out, in): the gradient dx (T, in) in dy's dtype."""
    return dy_TF @ dequantize_nf4(nf4, dy_TF.dtype).view(nf4.shape)
