"""Matrix products, also on processors that cannot calculate in 16 bits.

torch hands bf16 and fp16 matrices on a CPU to oneDNN where the processor has instructions for them (AVX-512, AMX, Arm
with bf16). Elsewhere, on every processor that has AVX2 at most, it runs a plain loop: 0.4 to 11 GFLOP/s on a core of
Zen 3 that does 90 in fp32. There the operands are widened to fp32 a block at a time, multiplied in fp32, and every
element of the result is rounded once, as oneDNN does it. Widening costs a few percent of the product, and some memory
(`widened_bytes`).

On a GPU a result may be fp32 where the factors are not (`adds_up_in`): gradients are added up so, by the product
itself, and what comes out of the units that multiply is not rounded to 16 bits before.

Not here: autograd (`model/project.py` has it), batched products, and anything special for fp32, fp64 or a GPU, which
go straight to torch.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_BYTES = 4 * 2**20  # of a widened operand and of sums, in a core's share of the last level of cache
MIN_BLOCK = 256  # rows or columns, below which a product would spend more time on widening than on multiplying


def mm(a_MK: Tensor, b_KN: Tensor, out: Tensor | None = None) -> Tensor:
    """a b in their common dtype, or into `out` (M, N) in its, see `adds_up_in`; sums are fp32 for 16-bit operands."""
    if not _must_widen(a_MK):
        if out is not None and out.dtype != a_MK.dtype:
            return torch.mm(a_MK, b_KN, out_dtype=out.dtype, out=out)
        return torch.mm(a_MK, b_KN) if out is None else torch.mm(a_MK, b_KN, out=out)
    if out is None:
        out = a_MK.new_empty(a_MK.shape[0], b_KN.shape[1])
    return _widened(out, a_MK, b_KN, beta=0.0, alpha=1.0)


def addmm_(out: Tensor, a_MK: Tensor, b_KN: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """out = beta out + alpha a b in place, rounded once; `out` (M, N) is returned. beta = 0 ignores what is in it."""
    if not _must_widen(a_MK):
        if out.dtype != a_MK.dtype:
            return torch.addmm(out, a_MK, b_KN, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
        return out.addmm_(a_MK, b_KN, beta=beta, alpha=alpha)
    return _widened(out, a_MK, b_KN, beta=beta, alpha=alpha)


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


def widened_bytes(rows: int, inner: int, columns: int, dtype: torch.dtype) -> int:
    """Of the fp32 blocks that a product (rows, inner) (inner, columns) in `dtype` has on this processor; mostly 0."""
    if _cpu_multiplies(dtype):
        return 0
    side = _block_side(inner)
    rows, columns = min(rows, side), min(columns, side)
    return 4 * (rows * inner + inner * columns + rows * columns)


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


def _widened(out: Tensor, a_MK: Tensor, b_KN: Tensor, beta: float, alpha: float) -> Tensor:
    """out = beta out + alpha a b in fp32, block after block of the result. K stays whole: one sum, one rounding."""
    assert not (torch.is_grad_enabled() and (a_MK.requires_grad or b_KN.requires_grad)), "nothing is kept for backward"
    side = _block_side(a_MK.shape[1])
    a_wide, b_wide = (torch.empty_like(part, dtype=torch.float32) for part in (a_MK[:side], b_KN[:, :side]))
    sums = a_wide.new_empty(len(a_wide), b_wide.shape[1])
    for column in range(0, b_KN.shape[1], side):
        b_block = b_KN[:, column : column + side]
        b_block = b_wide[:, : b_block.shape[1]].copy_(b_block)
        for row in range(0, len(a_MK), side):
            a_block = a_MK[row : row + side]
            a_block = a_wide[: len(a_block)].copy_(a_block)
            block = out[row : row + side, column : column + side]
            sum_block = sums[: block.shape[0], : block.shape[1]]
            if beta:
                sum_block.copy_(block)
            block.copy_(sum_block.addmm_(a_block, b_block, beta=beta, alpha=alpha))
    return out


def _block_side(inner: int) -> int:
    """Rows of a, columns of b, and both of the result."""
    most = int(math.sqrt(BLOCK_BYTES / 4))
    return max(MIN_BLOCK, min(most, BLOCK_BYTES // (4 * max(1, inner))))
