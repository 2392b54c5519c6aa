"""Block-wise absmax quantisation to signed 4- or 8-bit integers: what NF4 is compared with.

    code = round(w / max |block| * q)      w ~ code * max |block| / q      q = 7 (INT4) or 127 (INT8)

Paper: Dettmers et al. 2022, arXiv 2208.07339, section 2.1 (absmax). A baseline for errors and not a way to store
weights: plain PyTorch, and INT4 codes are not packed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minift.ops.nf4 import BLOCK_SIZE, absmax_of

BITS = (4, 8)


def quantize_absmax(weight: Tensor, num_bits: int, block_size: int = BLOCK_SIZE) -> tuple[Tensor, Tensor]:
    """Codes int8 (n,) in [-q, q] and absmax fp32 (ceil(n / block_size),) of a weight of n elements.

    Rounds to nearest, ties to even, in fp32. ValueError if an element is NaN or infinite.
    """
    largest_code = _largest_code(num_bits)
    absmax = absmax_of(weight, block_size)
    flat = weight.reshape(-1).float()
    divisor = absmax.repeat_interleave(block_size)[: flat.numel()]
    normalised = torch.where(divisor > 0, flat / divisor, 0.0)
    return (normalised * largest_code).round().to(torch.int8), absmax


def dequantize_absmax(codes: Tensor, absmax: Tensor, num_bits: int, block_size: int = BLOCK_SIZE) -> Tensor:
    """fp32 (n,): the inverse of `quantize_absmax` up to half a step, absmax / (2 q)."""
    scale = absmax / _largest_code(num_bits)
    return codes * scale.repeat_interleave(block_size)[: codes.numel()]


def _largest_code(num_bits: int) -> int:
    if num_bits not in BITS:
        raise ValueError(f"absmax quantisation: the number of bits is {num_bits}; expected one of {BITS}")
    return 2 ** (num_bits - 1) - 1
