"""Products of wide matrices (T, W) with narrow ones (T, R), R being a rank: what LoRA and its relatives add to a model.

With factors F (W, R), which for LoRA are Aᵀ and B:

    to_rank            narrow = scale · wide F
    add_from_rank_     wide  += narrow Fᵀ
    factor_gradients_  dF     = wideᵀ narrow

Each does several at once, because one is over before a thread has woken up for it, or a GPU's next kernel has begun. In
bf16 these are compiled kernels; general GEMMs are slow where one side of a matrix is 16. Everything else is products by
PyTorch: other dtypes, and on a GPU ranks with which a wide matrix would be read twice. Sums are fp32, and results are
rounded once (in PyTorch, factors of one wide matrix also after they were scaled). Not here: autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minift.ops import extension
from minift.ops.matmul import addmm_, mm

MOST_RANKS_ON_GPU = 64
"""Of one wide matrix, that its kernels take at once (csrc/cuda/low_rank_tiles.h: GROUP tiles of TILE)."""


def to_rank(wides: Sequence[Tensor], factors: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """[s_0 wide_0 F_0, s_1 wide_1 F_1, ..] side by side: (T, sum of ranks).

    wides: (T, W) each, one for each factor or one for all. factors: (W, R), in any layout and float dtype; they are
    cast to that of wides.
    """
    _check("to_rank", wides, factors)
    run = _to_rank if _is_compiled(wides, factors) else to_rank_reference
    return run(wides, _like(wides[0], factors), scales)


def add_from_rank_(wides: Sequence[Tensor], narrows: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """wide_i += narrow_i F_iᵀ in place; if there is one wide for all, the sum of all products is added to it."""
    _check("add_from_rank_", wides, factors)
    run = _add_from_rank_ if _is_compiled(wides, factors) else add_from_rank_reference
    run(wides, narrows, _like(wides[0], factors))


def factor_gradients_(gradients: Sequence[Tensor], wides: Sequence[Tensor], narrows: Sequence[Tensor]) -> None:
    """gradient_i = wide_iᵀ narrow_i, (W, R): contiguous or the transpose of what is, in any float dtype."""
    _check("factor_gradients_", wides, gradients)
    run = _factor_gradients_ if _is_compiled(wides, gradients) else factor_gradients_reference
    run(gradients, wides, narrows)


def to_rank_reference(wides: Sequence[Tensor], factors: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """`to_rank` in plain PyTorch."""
    if len(wides) == 1:
        scaled = [factor * scale for factor, scale in zip(factors, scales, strict=True)]
        return mm(wides[0], torch.cat(scaled, dim=1))
    narrow_TR = wides[0].new_empty(len(wides[0]), sum(factor.shape[1] for factor in factors))
    parts = narrow_TR.split([factor.shape[1] for factor in factors], dim=1)
    for part, wide, factor, scale in zip(parts, wides, factors, scales, strict=True):
        addmm_(part, wide, factor, beta=0.0, alpha=scale)
    return narrow_TR


def add_from_rank_reference(wides: Sequence[Tensor], narrows: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """`add_from_rank_` in plain PyTorch."""
    if len(wides) == 1:
        narrows, factors = [torch.cat(list(narrows), dim=1)], [torch.cat(list(factors), dim=1)]
    for wide, narrow, factor in zip(wides, narrows, factors, strict=True):
        addmm_(wide, narrow, factor.t())


def factor_gradients_reference(gradients: Sequence[Tensor], wides: Sequence[Tensor], narrows: Sequence[Tensor]) -> None:
    """`factor_gradients_` in plain PyTorch."""
    if len(wides) == 1 and len(narrows) > 1:
        stacked_RW = mm(torch.cat(list(narrows), dim=1).t(), wides[0])
        parts = stacked_RW.split([narrow.shape[1] for narrow in narrows])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.t())
        return
    for gradient, wide, narrow in zip(gradients, wides, narrows, strict=True):
        if gradient.dtype == wide.dtype:
            mm(wide.t(), narrow, out=gradient)
        else:
            gradient.copy_(mm(wide.t(), narrow))


def _is_compiled(wides: Sequence[Tensor], factors: Sequence[Tensor]) -> bool:
    if wides[0].dtype != torch.bfloat16:
        return False
    if wides[0].device.type == "cpu":
        return True
    ranks = [factor.shape[1] for factor in factors]
    return (sum(ranks) if len(wides) == 1 else max(ranks)) <= MOST_RANKS_ON_GPU


def _like(wide: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    return [factor.to(wide.dtype) for factor in factors]


def _check(op: str, wides: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    if len(wides) not in (1, len(factors)):
        raise ValueError(f"{op}: {len(wides)} wide matrices for {len(factors)} factors; valid: one for each, or one")


def _to_rank_fake(wides: Sequence[Tensor], factors: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    return wides[0].new_empty(wides[0].shape[0], sum(factor.shape[1] for factor in factors))


def _in_place_fake(*_: Sequence[Tensor]) -> None:
    return None


_to_rank = extension.op("to_rank", reference=to_rank_reference, fake=_to_rank_fake)
_add_from_rank_ = extension.op("add_from_rank_", reference=add_from_rank_reference, fake=_in_place_fake)
_factor_gradients_ = extension.op("factor_gradients_", reference=factor_gradients_reference, fake=_in_place_fake)
