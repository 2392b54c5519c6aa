"""SwiGLU of a gate and an up that lack their low-rank updates: y = silu(gate + update) * (up + update).

An update is a sum of narrow Fᵀ with narrow (T, R) and factors F (W, R), R being a rank (`ops.low_rank`). It is as wide
as what it belongs to: on a GPU, to write it before a product that is added to it, or after, costs a write and a read of
the two widest matrices of a model, and this kernel, which reads both anyway, has time to make the updates by itself. In
backward it makes them again, and that of dy.

In fp32 from the matrices that it reads to the result, rounded once. Compiled for bf16 on a GPU (`makes_updates`);
elsewhere products by PyTorch, in fp32. Not here: autograd.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from minift.ops import extension
from minift.ops.low_rank import MOST_TILES_ON_GPU, RANK_TILE
from minift.ops.swiglu import swiglu_backward_in_place_reference, swiglu_reference

_PACK = 8  # elements that the kernel reads at a time


def makes_updates(width: int, ranks: Iterable[Sequence[int]], dtype: torch.dtype, is_on_gpu: bool) -> bool:
    """Whether these operations are compiled for matrices (T, width) whose updates have these ranks: one sequence for
    each matrix."""
    fits = all(
        all(rank % _PACK == 0 for rank in of_one) and sum(-(-rank // RANK_TILE) for rank in of_one) <= MOST_TILES_ON_GPU
        for of_one in ranks
    )
    return is_on_gpu and dtype == torch.bfloat16 and width % _PACK == 0 and fits


def updated_swiglu(
    gate: Tensor, up: Tensor, narrows: Sequence[Tensor], factors: Sequence[Tensor], counts: Sequence[int]
) -> Tensor:
    """silu(gate + ..) * (up + ..), (T, W).

    gate, up: (T, W), contiguous. narrows: (T, R) each, of their dtype; factors: (W, R), in any layout and float dtype.
    counts: how many of them belong to gate, and how many to up.
    """
    return _updated_swiglu(gate, up, narrows, [factor.to(gate.dtype) for factor in factors], counts)


def updated_swiglu_backward_(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    narrows: Sequence[Tensor],
    factors: Sequence[Tensor],
    counts: Sequence[int],
    need_y: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate and up, of which the first takes the place of dy, and y or, unless needed, nothing.

    As above, with a third count, of those that dy lacks.
    """
    return dy, *_updated_swiglu_backward_(dy, gate, up, narrows, [f.to(gate.dtype) for f in factors], counts, need_y)


def updated_swiglu_reference(
    gate: Tensor, up: Tensor, narrows: Sequence[Tensor], factors: Sequence[Tensor], counts: Sequence[int]
) -> Tensor:
    """`updated_swiglu` in plain PyTorch."""
    return swiglu_reference(*_updated([gate, up], narrows, factors, counts)).to(gate.dtype)


def updated_swiglu_backward_reference(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    narrows: Sequence[Tensor],
    factors: Sequence[Tensor],
    counts: Sequence[int],
    need_y: bool = False,
) -> tuple[Tensor, Tensor]:
    """`updated_swiglu_backward_` in plain PyTorch; returns dup, and y or nothing."""
    gate_wide, up_wide, dy_wide = _updated([gate, up, dy], narrows, factors, counts)
    dup, y = swiglu_backward_in_place_reference(dy_wide, gate_wide, up_wide, need_y)
    dy.copy_(dy_wide)
    return dup.to(gate.dtype), y.to(gate.dtype)


def _updated(
    matrices: Sequence[Tensor], narrows: Sequence[Tensor], factors: Sequence[Tensor], counts: Sequence[int]
) -> list[Tensor]:
    """The matrices with their updates, in fp32 at least."""
    wide_dtype = torch.promote_types(matrices[0].dtype, torch.float32)
    wholes = []
    for matrix, count, end in zip(matrices, counts, accumulate(counts), strict=True):
        whole = matrix.to(wide_dtype, copy=True)
        for narrow, factor in zip(narrows[end - count : end], factors[end - count : end], strict=True):
            whole.addmm_(narrow.to(wide_dtype), factor.to(wide_dtype).t())
        wholes.append(whole)
    return wholes


def _updated_swiglu_fake(gate: Tensor, *_: object) -> Tensor:
    return gate.new_empty(gate.shape)


def _updated_swiglu_backward_fake(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    narrows: Sequence[Tensor],
    factors: Sequence[Tensor],
    counts: Sequence[int],
    need_y: bool,
) -> tuple[Tensor, Tensor]:
    return up.new_empty(up.shape), gate.new_empty(gate.shape if need_y else 0)


_updated_swiglu = extension.op("updated_swiglu", reference=updated_swiglu_reference, fake=_updated_swiglu_fake)
_updated_swiglu_backward_ = extension.op(
    "updated_swiglu_backward_", reference=updated_swiglu_backward_reference, fake=_updated_swiglu_backward_fake
)
