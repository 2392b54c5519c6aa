"""Matrix products, also on processors that cannot calculate in 16 bits.

torch hands bf16 and fp16 matrices on a CPU to oneDNN where the processor has instructions for them (AVX-512, AMX, Arm
with bf16). Elsewhere, on every processor that has AVX2 at most, it runs a plain loop: 0.4 to 11 GFLOP/s on a core of
Zen 3 that does 90 in fp32. There the operands are widened to fp32 a block at a time, multiplied in fp32, and every
element of the result is rounded once, as oneDNN does it. Widening costs a few percent of the product.

On a GPU a result may be fp32 where the factors are not (`adds_up_in`): gradients are added up so, by the product
itself, and what comes out of the units that multiply is not rounded to 16 bits before.

Not here: autograd (`model/linear.py` has it), batched products, and anything special for fp32, fp64 or a GPU, which
go straight to torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_BYTES = 4 * 2**20  # of widened operands, in a core's share of the last level of cache
MIN_BLOCK = 256  # rows or columns, below which a product would spend more time on widening than on multiplying


def mm(a_MK: Tensor, b_KN: Tensor, out: Tensor | None = None) -> Tensor:
    """a b in their common dtype, or into `out` (M, N) in its, see `adds_up_in`; sums are fp32 for 16-bit operands."""
    if not _must_widen(a_MK):
        if out is not None and out.dtype != a_MK.dtype:
            return torch.mm(a_MK, b_KN, out_dtype=out.dtype, out=out)
        return torch.mm(a_MK, b_KN) if out is None else torch.mm(a_MK, b_KN, out=out)
    if out is None:
        out = a_MK.new_empty(a_MK.shape[0], b_KN.shape[1])
    for rows, columns, a_wide, b_wide in _blocks(a_MK, b_KN):
        out[rows, columns] = torch.mm(a_wide, b_wide)
    return out


def addmm_(out: Tensor, a_MK: Tensor, b_KN: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """out = beta out + alpha a b in place, rounded once; `out` (M, N) is returned. beta = 0 ignores what is in it."""
    if not _must_widen(a_MK):
        if out.dtype != a_MK.dtype:
            return torch.addmm(out, a_MK, b_KN, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
        return out.addmm_(a_MK, b_KN, beta=beta, alpha=alpha)
    for rows, columns, a_wide, b_wide in _blocks(a_MK, b_KN):
        block = out[rows, columns]
        block.copy_(block.float().addmm_(a_wide, b_wide, beta=beta, alpha=alpha))
    return out


def linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, a fresh (N, out) in their common dtype."""
    if not _must_widen(x_NI):
        return F.linear(x_NI, weight_OI, bias_O)
    if bias_O is None:
        return mm(x_NI, weight_OI.t())
    out_NO = bias_O.to(x_NI.dtype).expand(len(x_NI), -1).clone()
    return addmm_(out_NO, x_NI, weight_OI.t())


def adds_up_in(total_dtype: torch.dtype, factors_dtype: torch.dtype, is_on_gpu: bool) -> bool:
    """Whether a result may have this dtype: the factors' own, and on a GPU also fp32 for 16 bits."""
    if total_dtype == factors_dtype:
        return True
    return is_on_gpu and total_dtype == torch.float32 and factors_dtype in (torch.bfloat16, torch.float16)


def _must_widen(operand: Tensor) -> bool:
    return operand.device.type == "cpu" and not _cpu_multiplies(operand.dtype)


@functools.cache
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch has a fast product of `dtype` matrices on this processor."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    is_bf16 = dtype == torch.bfloat16
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() if is_bf16 else torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _blocks(a_MK: Tensor, b_KN: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Blocks (rows, columns) of the result, and the fp32 factors of each. K stays whole: one sum, rounded once."""
    size = max(MIN_BLOCK, BLOCK_BYTES // (4 * max(1, a_MK.shape[1])))
    for column in range(0, b_KN.shape[1], size):
        columns = slice(column, column + size)
        b_wide = b_KN[:, columns].float()
        for row in range(0, a_MK.shape[0], size):
            rows = slice(row, row + size)
            yield rows, columns, a_MK[rows].float(), b_wide
