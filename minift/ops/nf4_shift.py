"""ICQ: a number for each block that is taken from its weights before they are quantised, so that codes say more.

    codes of w - τ,    w ~ CODEBOOK[code] * scale + τ        τ in bf16: 4.38 bits a weight in all, with blocks of 64

Of the candidates for τ, the one whose 16 codes have the largest entropy, -Σ p log₂ p with p the share of each code in
the block: the median of the block, plus f max |w - median| for 2 n + 1 numbers f evenly over [-λσ, λσ]; the first of
equals. λ = 0.1, n = 100, and σ is such that the largest weight of a block lies at the outermost quantile of NF4.

Paper: Qin et al. 2024, arXiv 2402.05445, section 3.2 (IR-QLoRA), which guarantees no less entropy than with τ = median.
One more candidate, 0, comes last here: so no block has less than plain NF4 gives it. Where the authors' code searches
with exact τ, quantises, and then rounds τ to 8 bits, candidates are rounded first: what is chosen is what is kept.

A block knows nothing of its neighbours. The numbers that are compared are those that the quantiser compares. On a CPU
the search is compiled, many blocks at a time; in plain PyTorch, counting codes takes 15 searches in a sorted block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minift.ops import extension
from minift.ops.nf4_tables import BLOCK_SIZE, SMALLEST_DIVISOR, THRESHOLDS

_RANGE, _STEPS = 0.1, 100  # λ, n
_SIGMA = 1.0 / torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.9677083)).item()
_CHUNK_BLOCKS = 4096  # of 64 fp32 elements: what stays in a cache
_ENTROPY_UNIT = 1 << 20  # entropies are compared as whole numbers, which have no order of summation


def block_shifts(weight: Tensor, block_size: int = BLOCK_SIZE) -> Tensor:
    """τ of each block, bf16 (blocks,), of `weight`, any shape and float dtype, whole blocks of finite numbers."""
    blocks = weight.reshape(-1, block_size)
    shifts = torch.empty(len(blocks), dtype=torch.bfloat16, device=weight.device)
    for start in range(0, len(blocks), _CHUNK_BLOCKS):
        part = slice(start, start + _CHUNK_BLOCKS)
        sorted_BN = blocks[part].float().sort(1).values
        shifts[part] = _nf4_shifts(sorted_BN.t().contiguous(), candidates(sorted_BN), _lacks(block_size, weight.device))
    return shifts


def shifted(weight: Tensor, shifts: Tensor) -> Tensor:
    """w - τ in fp32, in the shape of `weight`, whose blocks `shifts` (blocks,) are of."""
    return (weight.float().reshape(len(shifts), -1) - shifts.float().unsqueeze(1)).view(weight.shape)


def candidates(sorted_BN: Tensor) -> Tensor:
    """(2 n + 2, B) in bf16 of blocks whose elements ascend, in the order in which they are tried."""
    median_B = sorted_BN[:, (sorted_BN.shape[1] - 1) // 2]
    size_B = torch.maximum(median_B - sorted_BN[:, 0], sorted_BN[:, -1] - median_B)
    reach = _RANGE * _SIGMA
    factors_F = torch.linspace(-reach, reach, 2 * _STEPS + 1, device=sorted_BN.device)
    of_paper_FB = (factors_F.unsqueeze(1) * size_B + median_B).bfloat16()
    return torch.cat([of_paper_FB, torch.zeros_like(of_paper_FB[:1])])


def nf4_shifts_reference(columns_NB: Tensor, candidates_FB: Tensor, lacks: Tensor) -> Tensor:
    """The first of `candidates_FB` with the largest entropy, for each block: (B,). Blocks are columns that ascend.

    lacks: (N + 1,) int64, what a code that occurs so many times takes away from the entropy.
    """
    sorted_BN = columns_NB.t().contiguous()
    thresholds = THRESHOLDS.to(sorted_BN.device).expand(len(sorted_BN), -1).contiguous()
    ends = torch.full((len(sorted_BN), 1), sorted_BN.shape[1], dtype=torch.int32, device=sorted_BN.device)
    best_B = candidates_FB[0].clone()
    least_B = torch.full(best_B.shape, torch.iinfo(torch.int64).max, device=best_B.device)
    for shift_B in candidates_FB:
        moved_BN = sorted_BN - shift_B.float().unsqueeze(1)
        absmax_B = torch.maximum(-moved_BN[:, 0], moved_BN[:, -1])
        moved_BN *= (1 / absmax_B.clamp(min=SMALLEST_DIVISOR)).unsqueeze(1)
        up_to = torch.searchsorted(moved_BN, thresholds, right=True, out_int32=True)
        of_code = torch.diff(up_to, dim=1, prepend=torch.zeros_like(ends), append=ends)
        lack_B = lacks[of_code].sum(1)
        best_B = torch.where(lack_B < least_B, shift_B, best_B)
        least_B = torch.minimum(lack_B, least_B)
    return best_B


def _lacks(size: int, device: torch.device) -> Tensor:
    """c log₂ c for counts c: over all codes they add up to N log₂ N - N entropy."""
    counts = torch.arange(size + 1, dtype=torch.float64)
    return (counts * counts.clamp(min=1).log2() * _ENTROPY_UNIT).round().long().to(device)


def _nf4_shifts_fake(columns_NB: Tensor, candidates_FB: Tensor, lacks: Tensor) -> Tensor:
    return torch.empty_like(candidates_FB[0])


_nf4_shifts = extension.op("nf4_shifts", reference=nf4_shifts_reference, fake=_nf4_shifts_fake)
