"""Products of wide matrices (T, W) with narrow ones (T, R), R being a rank: what LoRA and its relatives add to a model.

With factors F (W, R), which for LoRA are Aᵀ and B:

    to_rank            narrow = scale · wide F
    from_rank          wide   = bias + narrow_0 F_0ᵀ + narrow_1 F_1ᵀ + ..
    factor_gradients_  dF     = wideᵀ narrow

and, with each wide matrix read once for both, the first and the last of them (to_rank_and_gradients_).

Each does several at once, because one is over before a thread has woken up for it, or a GPU's next kernel has begun. In
bf16 these are compiled kernels; general GEMMs are slow where one side of a matrix is 16. Everything else is products by
PyTorch: other dtypes, and on a GPU ranks with which a wide matrix would be read twice. Sums are fp32, and results are
rounded once (in PyTorch, factors of one wide matrix also after they were scaled). Not here: autograd.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from minift.ops import extension
from minift.ops.matmul import addmm_, linear, mm

MOST_TILES_ON_GPU, RANK_TILE = 4, 16
"""Ranks of one wide matrix that its kernels take at once (csrc/cuda/low_rank_work.h: GROUP tiles of TILE)."""


def to_rank(wides: Sequence[Tensor], factors: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """[s_0 wide_0 F_0, s_1 wide_1 F_1, ..] side by side: (T, sum of ranks).

    wides: (T, W) each, one for each factor or one for all. factors: (W, R), in any layout and float dtype; they are
    cast to that of wides.
    """
    _check("to_rank", wides, factors)
    terms = [factors] if len(wides) == 1 else [[factor] for factor in factors]
    run = _to_rank if _is_compiled(wides[0], terms) else to_rank_reference
    return run(wides, _like(wides[0], factors), scales)


def from_rank(
    narrows: Sequence[Tensor], factors: Sequence[Tensor], counts: Sequence[int], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """[biases[0] + the sum of narrow Fᵀ over the first counts[0] terms, the next of counts[1] after them, ..]: (T, W).

    narrows: (T, R) each, whose dtype is the result's. factors: (W, R), in any layout and float dtype, cast to it;
    biases: (W,) likewise, or None.
    """
    if not len(narrows) == len(factors) == sum(counts) or min(counts, default=0) < 1 or len(biases) != len(counts):
        raise ValueError(
            f"from_rank: {len(narrows)} narrow matrices, {len(factors)} factors, {len(biases)} biases, and wide "
            f"matrices of {list(counts)} terms; valid: a factor for each narrow matrix, all of which belong to a wide "
            "one, which has at least one, and a bias or None"
        )
    run = _from_rank if _is_compiled(narrows[0], _by_count(factors, counts)) else from_rank_reference
    none = narrows[0].new_empty(0)
    return run(
        narrows, _like(narrows[0], factors), counts, _like(none, [none if bias is None else bias for bias in biases])
    )


def factor_gradients_(gradients: Sequence[Tensor], wides: Sequence[Tensor], narrows: Sequence[Tensor]) -> None:
    """gradient_i = wide_iᵀ narrow_i, (W, R): contiguous or the transpose of what is, in any float dtype."""
    _check("factor_gradients_", wides, gradients)
    terms = [gradients] if len(wides) == 1 else [[gradient] for gradient in gradients]
    run = _factor_gradients_ if _is_compiled(wides[0], terms) else factor_gradients_reference
    run(gradients, wides, narrows)


def to_rank_and_gradients_(
    wides: Sequence[Tensor],
    factors: Sequence[Tensor],
    scales: Sequence[float],
    narrows: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> Tensor:
    """`factor_gradients_(gradients, wides, narrows)` and then `to_rank(wides, factors, scales)`, which is returned.

    Wide matrices are read once for both if `reads_wide_once` and gradients are contiguous.
    """
    _check("to_rank_and_gradients_", wides, factors)
    terms = [factors] if len(wides) == 1 else [[factor] for factor in factors]
    run = _to_rank_and_gradients_ if _is_compiled(wides[0], terms) else to_rank_and_gradients_reference
    return run(wides, _like(wides[0], factors), scales, narrows, gradients)


def reads_wide_once(shapes: Iterable[tuple[int, int]], dtype: torch.dtype, is_on_gpu: bool) -> bool:
    """Whether `to_rank_and_gradients_` of factors (W, R) of these shapes can: on a GPU, in packs of 8 numbers."""
    is_fast = is_on_gpu and dtype == torch.bfloat16
    return is_fast and all(width % 8 == 0 and rank in (8, 16) for width, rank in shapes)


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


def from_rank_reference(
    narrows: Sequence[Tensor], factors: Sequence[Tensor], counts: Sequence[int], biases: Sequence[Tensor]
) -> list[Tensor]:
    """`from_rank` in plain PyTorch; a bias without elements is none."""
    wides = []
    for terms, of_factors, bias in zip(_by_count(narrows, counts), _by_count(factors, counts), biases, strict=True):
        narrow_TR = terms[0] if len(terms) == 1 else torch.cat(terms, dim=1)
        factor_WR = of_factors[0] if len(terms) == 1 else torch.cat(of_factors, dim=1)
        wides.append(linear(narrow_TR, factor_WR, bias if bias.numel() else None))
    return wides


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


def to_rank_and_gradients_reference(
    wides: Sequence[Tensor],
    factors: Sequence[Tensor],
    scales: Sequence[float],
    narrows: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> Tensor:
    """`to_rank_and_gradients_` in plain PyTorch."""
    factor_gradients_reference(gradients, wides, narrows)
    return to_rank_reference(wides, factors, scales)


def _is_compiled(operand: Tensor, terms: Sequence[Sequence[Tensor]]) -> bool:
    """terms: for each wide matrix the factors it has to do with."""
    if operand.dtype != torch.bfloat16:
        return False
    if operand.device.type == "cpu":
        return True
    tiles = [sum(-(-factor.shape[1] // RANK_TILE) for factor in factors) for factors in terms]
    return max(tiles) <= MOST_TILES_ON_GPU


def _by_count(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    """The first counts[0] of `tensors`, the next counts[1], .."""
    return [list(tensors[end - count : end]) for count, end in zip(counts, accumulate(counts), strict=True)]


def _like(wide: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    return [factor.to(wide.dtype) for factor in factors]


def _check(op: str, wides: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    if len(wides) not in (1, len(factors)):
        raise ValueError(f"{op}: {len(wides)} wide matrices for {len(factors)} factors; valid: one for each, or one")


def _to_rank_fake(wides: Sequence[Tensor], factors: Sequence[Tensor], *_: Sequence) -> Tensor:
    return wides[0].new_empty(wides[0].shape[0], sum(factor.shape[1] for factor in factors))


def _from_rank_fake(
    narrows: Sequence[Tensor], factors: Sequence[Tensor], counts: Sequence[int], biases: Sequence[Tensor]
) -> list[Tensor]:
    return [narrows[0].new_empty(len(narrows[0]), terms[0].shape[0]) for terms in _by_count(factors, counts)]


def _in_place_fake(*_: Sequence[Tensor]) -> None:
    return None


_to_rank = extension.op("to_rank", reference=to_rank_reference, fake=_to_rank_fake)
_from_rank = extension.op("from_rank", reference=from_rank_reference, fake=_from_rank_fake)
_factor_gradients_ = extension.op("factor_gradients_", reference=factor_gradients_reference, fake=_in_place_fake)
_to_rank_and_gradients_ = extension.op(
    "to_rank_and_gradients_", reference=to_rank_and_gradients_reference, fake=_to_rank_fake
)
