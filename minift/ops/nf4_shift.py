"""ICQ: a number for each block that is taken from its weights before they are quantised, so that codes say more.

    codes of w - τ,    w ~ CODEBOOK[code] * scale + τ        τ in bf16: 4.38 bits a weight in all, with blocks of 64

Of the candidates for τ, the one whose 16 codes have the largest entropy, -Σ p log₂ p with p the share of each code in
the block: the median of the block, plus f max |w - median| for 2 n + 1 numbers f evenly over [-λσ, λσ]; the first of
equals. λ = 0.1, n = 100, and σ is such that the largest weight of a block lies at the outermost quantile of NF4.

Paper: Qin et al. 2024, arXiv 2402.05445, section 3.2 (IR-QLoRA), which guarantees no less entropy than with τ = median.
One more candidate, 0, comes last here: so no block has less than plain NF4 gives it. Where the authors' code searches
with exact τ, quantises, and then rounds τ to 8 bits, candidates are rounded first: what is chosen is what is kept.

A block knows nothing of its neighbours. Plain PyTorch, as it runs once: counting codes needs 15 searches in a sorted
block, not a look at each element, and the numbers that are compared are those that the quantiser compares.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
        shifts[part] = _best(blocks[part].float().sort(1).values)
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


def _best(sorted_BN: Tensor) -> Tensor:
    """The shift (B,) of each block."""
    size = sorted_BN.shape[1]
    counts = torch.arange(size + 1, dtype=torch.float64)
    # Σ c log₂ c = N log₂ N - N entropy: the smaller the better.
    lacks = (counts * counts.clamp(min=1).log2() * _ENTROPY_UNIT).round().long().to(sorted_BN.device)
    thresholds = THRESHOLDS.to(sorted_BN.device).expand(len(sorted_BN), -1).contiguous()
    ends = torch.full((len(sorted_BN), 1), size, dtype=torch.int32, device=sorted_BN.device)
    best_B, least_B = None, None
    for shift_B in candidates(sorted_BN):
        moved_BN = sorted_BN - shift_B.float().unsqueeze(1)
        absmax_B = torch.maximum(-moved_BN[:, 0], moved_BN[:, -1])
        moved_BN *= (1 / absmax_B.clamp(min=SMALLEST_DIVISOR)).unsqueeze(1)
        up_to = torch.searchsorted(moved_BN, thresholds, right=True, out_int32=True)
        of_code = torch.diff(up_to, dim=1, prepend=torch.zeros_like(ends), append=ends)
        lack_B = lacks[of_code].sum(1)
        if least_B is None:
            best_B, least_B = shift_B.clone(), lack_B
        else:
            best_B = torch.where(lack_B < least_B, shift_B, best_B)
            least_B = torch.minimum(lack_B, least_B)
    return best_B
