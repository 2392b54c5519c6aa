"""fp32 weights in two halves: the bf16 number nearest to each, and the 16 bits that it lacks.

    bits(weight) = bits(upper) 2^16 + lower        upper: bf16        lower: int16, from -2^15 to 2^15 - 1

No bit is lost: the halves are the fp32 master weight, in its 4 bytes. But the upper half is also what mixed precision
computes with and sends (`precision.wire`), so nothing has to be cast or copied before that, and where nothing has to be
gathered either (one process, or ranks that share memory) compute reads the very memory that the optimizer updates.

Kalamkar et al. 2020, arXiv 2005.04680 (Split-SGD), cut the bits in two, so their upper half is the weight
rounded towards zero, about twice as far from it. Here it is rounded to nearest, and the lower half, signed, may point
back. Where two bf16 numbers are equally near, the upper half is the one further from zero, where a cast takes the even
one: one weight in 65,536. NaNs become the NaN 0x7fc00000.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_PIECE_ELEMENTS = 1 << 20
"""Are converted at a time, through 8 or 12 bytes each of scratch."""


def read_weights(master: Tensor, lower: Tensor | None, out: Tensor | None = None) -> Tensor:
    """(n,) fp32 of both halves, or `master` itself if there is no `lower` one.

    master: (n,) fp32 or bf16; the upper half, in bf16, of what `lower` (n,) int16 completes.
    out: (n,) where to put them, in that dtype. None: they are not copied, or get new memory.
    """
    if lower is None:
        return master if out is None else out.copy_(master)
    if out is None:
        out = torch.empty_like(lower, dtype=torch.float32)
    for here in _pieces(out):
        upper = master[here].view(torch.int16).to(torch.int32)
        out[here].view(torch.int32).copy_((upper << 16).add_(lower[here]))
    return out


def write_weights_(master: Tensor, lower: Tensor | None, values: Tensor) -> None:
    """Let `read_weights(master, lower)` be `values`, (n,) of any float dtype, as exactly as these can hold them."""
    if lower is None:
        for here in _pieces(values):  # a copy to a GPU's host that converts, too, does so there, in one thread
            master[here].copy_(values[here].to(master.dtype))
        return
    upper = master.view(torch.int16)
    for here in _pieces(values):
        exact = values[here].to(lower.device, torch.float32)
        bits = torch.where(exact.isnan(), torch.nan, exact).view(torch.int32)  # a NaN must not be carried around to 0
        lower[here].copy_(bits)  # the lowest bits of each
        upper[here].copy_((bits + 2**15) >> 16)


def _pieces(values: Tensor) -> Iterator[slice]:
    return (slice(start, start + _PIECE_ELEMENTS) for start in range(0, len(values), _PIECE_ELEMENTS))
