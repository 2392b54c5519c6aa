"""Matrix products with an NF4 weight: y = x W^T, and the gradient dx = dy W.

Many tokens: a slice of W that fits the cache is dequantised, multiplied, and overwritten by the next one, so a full
copy of W never exists. Few tokens (generation): nothing is written at all; codes are looked up in registers, where the
time is that of reading 4.5 bits per weight. The weight is frozen: it has no gradient, and there is no autograd here.
The module that owns the weight saves nothing but this matrix for backward (minift/quant).

Weights are rounded to the dtype of x: every product codebook * scale for many tokens; for few tokens in bf16 the
codebook. Sums are fp32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minift.ops import extension
from minift.ops.matmul import addmm_, mm
from minift.ops.nf4 import (
    Nf4,
    dequantize_nf4,
    dequantize_nf4_columns,
    dequantize_nf4_reference,
    scale_tensors,
)

# Of dequantised weight at a time. On a CPU: in the second or third level of cache (smaller ones cost more in GEMM calls
# than they save). On a GPU, where a product hides what it reads, and slices that stay in the L2 made nothing faster:
# as few as memory allows, and whole tiles of a product, without which cuBLAS takes kernels of half the speed.
SLICE_BYTES, GPU_SLICE_BYTES = 4 << 20, 64 << 20
GPU_TILE = 256

# Up to here looking codes up (on a CPU again for every 8 tokens) is cheaper than writing the weight.
FEW_TOKENS, GPU_FEW_TOKENS = 16, 8


@torch.no_grad()
def nf4_linear(x_TD: Tensor, nf4: Nf4, add_to: Tensor | None = None) -> Tensor:
    """x (T, in) times the transpose of nf4 (out, in): (T, out) in x's dtype. Not differentiable.

    add_to: (T, out) in x's dtype, to which it is added in place, and which is returned. The product of many tokens is
    not rounded before it is added, and there is no tensor of its size.
    """
    num_outputs, num_inputs = _check("nf4_linear", "x", x_TD, nf4, dim=1)
    few_tokens = GPU_FEW_TOKENS if x_TD.is_cuda else FEW_TOKENS
    if x_TD.shape[0] <= few_tokens and num_inputs % nf4.block_size == 0 and x_TD.dtype != torch.float64:
        y_TF = _gemv(x_TD, nf4.codes, *scale_tensors(nf4), nf4.block_size)
        return y_TF if add_to is None else add_to.add_(y_TF)

    # A slice is a number of rows that starts and ends at the border of a block.
    unit = nf4.block_size // math.gcd(nf4.block_size, num_inputs)
    rows = slice_width(num_outputs, unit, num_inputs * x_TD.element_size(), x_TD.is_cuda)
    y_TF = x_TD.new_empty(x_TD.shape[0], num_outputs) if add_to is None else add_to
    scratch = x_TD.new_empty(rows * num_inputs)
    for start in range(0, num_outputs, rows):
        stop = min(start + rows, num_outputs)
        weight = scratch[: (stop - start) * num_inputs]
        dequantize_nf4(nf4, x_TD.dtype, start * num_inputs, stop * num_inputs, out=weight)
        weight_DS, y_TS = weight.view(stop - start, num_inputs).t(), y_TF[:, start:stop]
        mm(x_TD, weight_DS, out=y_TS) if add_to is None else addmm_(y_TS, x_TD, weight_DS)
    return y_TF


@torch.no_grad()
def nf4_linear_dx(dy_TF: Tensor, nf4: Nf4, add_to: Tensor | None = None) -> Tensor:
    """dy (T, out) times nf4 (out, in): the gradient dx (T, in) in dy's dtype. Not differentiable.

    add_to: (T, in) in dy's dtype, to which it is added in place, and which is returned. The product is not rounded
    before it is added, and there is no tensor of its size: a slice at a time goes into add_to.

    Slices are columns of W, so each element of dx is one sum in fp32, rounded once. A weight whose rows are not whole
    blocks has no such slices and is dequantised at once.
    """
    num_outputs, num_inputs = _check("nf4_linear_dx", "dy", dy_TF, nf4, dim=0)
    if num_inputs % nf4.block_size:
        weight = dequantize_nf4(nf4, dy_TF.dtype).view(num_outputs, num_inputs)
        return mm(dy_TF, weight) if add_to is None else addmm_(add_to, dy_TF, weight)
    columns = slice_width(num_inputs, nf4.block_size, num_outputs * dy_TF.element_size(), dy_TF.is_cuda)
    dx_TD = dy_TF.new_empty(dy_TF.shape[0], num_inputs) if add_to is None else add_to
    scratch = dy_TF.new_empty(num_outputs * columns)
    for start in range(0, num_inputs, columns):
        width = min(columns, num_inputs - start)
        weight = dequantize_nf4_columns(nf4, start, scratch[: num_outputs * width].view(num_outputs, width))
        dx_TS = dx_TD[:, start : start + width]
        mm(dy_TF, weight, out=dx_TS) if add_to is None else addmm_(dx_TS, dy_TF, weight)
    return dx_TD


def nf4_gemv_reference(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    nested_map: Tensor | None,
    block_size: int,
) -> Tensor:
    """x (T, in) times the transpose of the matrix that codes and scales describe, in plain PyTorch."""
    weight = x.new_empty(1, 2 * codes.numel())
    dequantize_nf4_reference(weight, codes, scales, nested_absmax, offset, nested_map, block_size, 0, 0)
    return mm(x, weight.view(-1, x.shape[1]).t())


def _check(function: str, name: str, tensor: Tensor, nf4: Nf4, dim: int) -> tuple[int, int]:
    """The shape of the matrix, if `tensor` is (T, its size `dim`)."""
    if len(nf4.shape) != 2 or tensor.dim() != 2 or tensor.shape[1] != nf4.shape[dim]:
        raise ValueError(
            f"{function}: {name} is {tuple(tensor.shape)} and the weight {nf4.shape}; expected a weight (out, in) and "
            f"{name} (T, {'in' if dim == 1 else 'out'})"
        )
    return nf4.shape


def slice_width(count: int, unit: int, bytes_each: int, is_on_gpu: bool) -> int:
    """How many of `count` rows or columns to dequantise at once: slices of one size, multiples of `unit`, or all."""
    slice_bytes, unit = (GPU_SLICE_BYTES, math.lcm(unit, GPU_TILE)) if is_on_gpu else (SLICE_BYTES, unit)
    num_slices = max(1, round(count * bytes_each / slice_bytes))
    return min(count, -(-count // (num_slices * unit)) * unit)


def _gemv_fake(x, codes, scales, nested_absmax, offset, nested_map, block_size) -> Tensor:
    return x.new_empty(x.shape[0], 2 * codes.numel() // x.shape[1])


_gemv = extension.op("nf4_gemv", reference=nf4_gemv_reference, fake=_gemv_fake)
