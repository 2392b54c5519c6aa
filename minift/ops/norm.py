"""RMS normalisation: forward and backward as two plain functions.

    rstd = 1 / sqrt(mean(x^2) + eps)          y = round(x * rstd) * weight

Paper: Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4, with Hugging Face's eps and its rounding: the normalised row is
rounded to the dtype of x before the multiplication by the weight. Everything else is fp32 inside.

There is no autograd here: the module that owns the weight decides what to keep for backward (minift/model/norm.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from minift.ops import extension


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalise the last dimension of x (..., D): returns y (..., D) in x's dtype and rstd (...) in fp32.

    weight has the dtype of x. Rows of x may be strided. float64 is computed in float64, rstd included.
    """
    _check_dtypes("rms_norm", x_ND, weight_D)
    if x_ND.dtype == torch.float64:
        return rms_norm_reference(x_ND, weight_D, eps)
    return _rms_norm(x_ND, weight_D, eps)


def rms_norm_backward(
    dy_ND: Tensor, x_ND: Tensor, weight_D: Tensor, rstd_N: Tensor, dresidual_ND: Tensor | None, need_dweight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients for `rms_norm`: dx (..., D) in x's dtype, and dweight (D) in fp32 if needed, else None.

    With n = x rstd and g = dy weight: dx = rstd (g - n mean(g n)), dweight = sum over rows of dy n. Differs from
    Hugging Face's autograd by keeping n and g in fp32, which is more exact. dweight does not depend on the number of
    threads. dresidual (..., D): x's gradient of another origin, which is added to the rounded dx, in the same pass.
    """
    _check_dtypes("rms_norm_backward", x_ND, weight_D)
    backward = rms_norm_backward_reference if x_ND.dtype == torch.float64 else _rms_norm_backward
    dx_ND, dweight_D = backward(dy_ND, x_ND, weight_D, rstd_N, dresidual_ND, need_dweight)
    return dx_ND, dweight_D if need_dweight else None


def rms_norm_reference(x_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` in plain PyTorch."""
    x = _at_least_fp32(x_ND)
    rstd_N = torch.rsqrt(x.square().mean(-1) + eps)
    return (x * rstd_N.unsqueeze(-1)).to(x_ND.dtype) * weight_D, rstd_N


def rms_norm_backward_reference(
    dy_ND: Tensor, x_ND: Tensor, weight_D: Tensor, rstd_N: Tensor, dresidual_ND: Tensor | None, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    """`rms_norm_backward` in plain PyTorch; dweight has no elements when it is not needed."""
    dy, rstd = _at_least_fp32(dy_ND), rstd_N.unsqueeze(-1)
    normed = _at_least_fp32(x_ND) * rstd
    scaled = dy * _at_least_fp32(weight_D)
    dx_ND = (rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))).to(x_ND.dtype)
    dweight_D = (dy * normed).flatten(0, -2).sum(0) if need_dweight else rstd_N.new_empty(0)
    return dx_ND if dresidual_ND is None else dx_ND + dresidual_ND, dweight_D


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check_dtypes(op: str, x: Tensor, weight: Tensor) -> None:
    if weight.dtype != x.dtype:
        raise ValueError(f"{op}: weight is {weight.dtype} but x is {x.dtype}; cast the weight to the dtype of x")


def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _rms_norm_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dresidual: Tensor | None, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if need_dweight else 0, dtype=torch.float32)


_rms_norm = extension.op("rms_norm", reference=rms_norm_reference, fake=_rms_norm_fake)
_rms_norm_backward = extension.op(
    "rms_norm_backward", reference=rms_norm_backward_reference, fake=_rms_norm_backward_fake
)
