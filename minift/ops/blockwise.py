"""Block-wise 8-bit quantisation of optimizer states: the maps, and quantising in plain PyTorch.

Each block of BLOCK elements is divided by its largest magnitude (absmax, fp32) and every element becomes the number of
the nearest of 256 values between -1 (signed) or 0 (unsigned) and 1. Dettmers et al. 2021, arXiv 2110.02861, sections 2
and 3. The values are bitsandbytes' dynamic maps, bit for bit: seven decades from 1e-7 to 1, and the higher a decade
the more values divide it evenly, so that large elements keep 0.7 % (signed) or 0.4 % and small ones their magnitude.

Rounding is to nearest, ties to the lower code. One exception, in the unsigned map: what is not zero does not become
zero (code 1 begins right above 0). A second moment of zero beside a first moment that is not zero would divide by eps.

Not bitsandbytes' CPU quantiser (0.50), which looks values up by their 16 leading bits in fixed point, and so moves
everything below 1e-5 of absmax to the fifth value of the map; its CUDA kernels and its fallback round to nearest.

The compiled kernels (`csrc/cpu/blockwise_kernels.h`) find a code by one look into `DynamicMap.buckets`. There is no op
for this alone: the kernels that use it dequantise, update and quantise while a block is in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

BLOCK = 256
"""Elements that share one absmax; bitsandbytes' block since 0.44."""

ZERO_CODES = {True: 127, False: 0}
"""Signed? -> the code of zero."""

_SMALLEST = 2.0**-23  # below every border between two codes; magnitudes are raised to it before buckets are numbered
_LOW_BITS = {True: 17, False: 16}  # of an fp32 below those that number its bucket: no bucket then has two borders


@dataclass(frozen=True)
class DynamicMap:
    """The 256 values of a code, and how a code is found.

    values: (256,) fp32, ascending.
    buckets: int32, for the kernels: entries (code << 17 | border), one for each run of 2^16 (unsigned) or 2^17 floats
        from 2^-23 to 1, then (signed) one for each such run below zero. The code is that of the bucket's beginning, and
        the next one away from zero holds for floats whose low bits are above `border`.
    """

    values: Tensor
    buckets: Tensor

    @property
    def borders(self) -> Tensor:
        """(255,) fp32; the code of a value is the number of borders that are less than it."""
        return _round_down(_middles(self.values))

    def to(self, device: torch.device) -> Self:
        return type(self)(self.values.to(device), self.buckets.to(device))


def dynamic_map(signed: bool) -> DynamicMap:
    """The map of first moments (signed) or second moments (unsigned)."""
    values = dynamic_map_values(signed)
    return DynamicMap(values, _buckets(_middles(values), signed))


def dynamic_map_values(signed: bool) -> Tensor:
    """(256,) fp32, ascending: 0 to 6 bits of (decimal) exponent, and the rest of a byte a linear fraction.

    Dettmers 2016, arXiv 1511.04561. Operation for operation what `bitsandbytes.functional.create_dynamic_map` does,
    because rounding shows.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        ends = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float32)
        middles = 10.0 ** (decade - 6) * ((ends[:-1] + ends[1:]) / 2.0)
        values += middles.tolist() + ((-middles).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


def quantize_blockwise(values: Tensor, dynamic_map: DynamicMap) -> tuple[Tensor, Tensor]:
    """codes (n,) uint8 and absmax (ceil(n / BLOCK),) fp32 of `values` (n,) fp32, which must be finite."""
    blocks = _blocks(values)
    absmax = blocks.abs().amax(1)
    # The inverse of a subnormal number may be infinite; a block of such numbers is stored as zeros.
    inverse = torch.where(absmax >= torch.finfo(torch.float32).tiny, 1.0 / absmax, 0.0)
    normed = blocks * inverse.unsqueeze(1)
    codes = torch.bucketize(normed, dynamic_map.borders, out_int32=True).to(torch.uint8)
    return codes.flatten()[: len(values)], absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, dynamic_map: DynamicMap) -> Tensor:
    """(n,) fp32 from codes (n,) uint8 and absmax (ceil(n / BLOCK),) fp32."""
    values = _blocks(dynamic_map.values[codes.int()]) * absmax.unsqueeze(1)
    return values.flatten()[: len(codes)]


def _blocks(values: Tensor) -> Tensor:
    """(blocks, BLOCK), the last one filled up with zeros."""
    return torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)


def _middles(values: Tensor) -> Tensor:
    """The borders between codes, exactly: (255,) fp64."""
    middles = (values[:-1].double() + values[1:].double()) / 2
    is_first_unsigned = (values[:-1] == 0) & (torch.arange(255, device=values.device) == 0)
    return torch.where(is_first_unsigned, 0.0, middles)


def _round_down(exact: Tensor) -> Tensor:
    """The largest fp32 that is not above."""
    rounded = exact.float()
    return torch.where(rounded.double() > exact, torch.nextafter(rounded, rounded.new_tensor(-2.0)), rounded)


def _buckets(middles: Tensor, signed: bool) -> Tensor:
    """`DynamicMap.buckets` from the exact borders."""
    low_bits = _LOW_BITS[signed]
    first, last = (bits >> low_bits for bits in torch.tensor([_SMALLEST, 1.0]).view(torch.int32).tolist())
    starts, stops = ((torch.arange(first, last + 1) + i << low_bits).int().view(torch.float32).double() for i in (0, 1))
    above = torch.bucketize(starts, middles)
    entries = [_entries(above, middles.take(above.clamp(max=254)), above < 255, stops, low_bits)]
    if signed:
        below = torch.bucketize(-starts, middles)
        # A float just below |middle| is the last with the code of the bucket's beginning.
        borders = torch.nextafter(-middles.take(below - 1), torch.zeros((), dtype=torch.float64))
        entries.append(_entries(below, borders, below > 0, stops, low_bits))
    return torch.cat(entries)


def _entries(codes: Tensor, borders: Tensor, has_border: Tensor, stops: Tensor, low_bits: int) -> Tensor:
    mask = (1 << low_bits) - 1
    inside = has_border & (borders < stops)
    low = torch.where(inside, _round_down(borders).view(torch.int32) & mask, mask)
    return (codes << 17 | low).int()
