"""Cross entropy of rows of logits, in place: every row becomes its gradient, softmax - one_hot.

Exponentials and sums are fp32, and the gradient is rounded once. The compiled op takes a row through all of it while it
is in cache; the reference does so with as many rows as fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minift.ops import extension

WIDE_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}  # widened to fp32 at a time: stays in cache; outlasts its launches


def cross_entropy_(logits_NV: Tensor, targets_N: Tensor, need_gradient: bool) -> Tensor:
    """-log softmax(logits_NV[n])[targets_N[n]] for every row n: (N,) fp32 (fp64 for fp64).

    Args:
        logits_NV: contiguous; overwritten by the gradient of the losses' sum if needed, else left in any state.
        targets_N: int64, in [0, V). Others are refused; CUDA's kernel, for which nobody waits, makes the loss and the
            gradient of such a row NaN.
    """
    if logits_NV.dim() != 2 or targets_N.shape != logits_NV.shape[:1] or targets_N.dtype != torch.int64:
        raise ValueError(
            f"cross_entropy_: logits are {tuple(logits_NV.shape)} but targets {tuple(targets_N.shape)} "
            f"{targets_N.dtype}; valid: (N, V), and N of int64"
        )
    run = cross_entropy_reference if logits_NV.dtype == torch.float64 else _cross_entropy_
    return run(logits_NV, targets_N, need_gradient)


def cross_entropy_reference(logits_NV: Tensor, targets_N: Tensor, need_gradient: bool) -> Tensor:
    """`cross_entropy_` in plain PyTorch."""
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    losses_N = logits_NV.new_empty(len(logits_NV), dtype=dtype)
    num_rows = max(1, WIDE_BYTES[logits_NV.device.type] // (logits_NV.shape[1] * dtype.itemsize))
    pieces = (tensor.split(num_rows) for tensor in (logits_NV, targets_N.unsqueeze(1), losses_N))
    for logits_RV, targets_R1, losses_R in zip(*pieces, strict=True):
        softmax_RV = logits_RV.to(dtype)  # fp32 logits: the same memory
        of_target_R1 = softmax_RV.gather(1, targets_R1)
        largest_R1 = softmax_RV.amax(1, keepdim=True)
        softmax_RV.sub_(largest_R1).exp_()
        total_R1 = softmax_RV.sum(1, keepdim=True)
        losses_R.copy_((total_R1.log() + (largest_R1 - of_target_R1)).squeeze(1))
        if need_gradient:
            minus_one_R1 = softmax_RV.new_full((1, 1), -1.0).expand_as(targets_R1)
            softmax_RV.div_(total_R1).scatter_add_(1, targets_R1, minus_one_R1)
            logits_RV.copy_(softmax_RV)
    return losses_N


def _cross_entropy_fake(logits_NV: Tensor, targets_N: Tensor, need_gradient: bool) -> Tensor:
    return logits_NV.new_empty(logits_NV.shape[0], dtype=torch.promote_types(logits_NV.dtype, torch.float32))


_cross_entropy_ = extension.op("cross_entropy_", reference=cross_entropy_reference, fake=_cross_entropy_fake)
