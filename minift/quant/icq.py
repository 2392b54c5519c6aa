"""A projection in NF4 whose blocks are shifted (ICQ, the first half of IR-QLoRA): y = x Wᵀ + b, W = W_nf4 + τ.

τ is the same within a block, so what it adds is a product with the sums of x over blocks, 1/64 of the work:

    y += sums(x) τᵀ        dx += dy τ, repeated over each block        τ (out, in / block_size)

`minift/ops/nf4_shift.py` has how τ is found, and the paper. In addition to the parameters of an `NF4Linear`:

    shifts   2 · blocks bytes: bf16

bitsandbytes has no place for them, so such a weight is made while a dense folder is read, and is never written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minift.ops.matmul import addmm_, mm
from minift.ops.nf4 import dequantize_nf4
from minift.ops.nf4_shift import block_shifts, shifted
from minift.quant.linear import NF4Linear


class IcqLinear(NF4Linear):
    """Rows must be whole blocks. Parameters start uninitialised."""

    def __init__(self, *nf4: Any) -> None:
        super().__init__(*nf4)
        assert self.in_features % self.block_size == 0, "rows must be whole blocks"
        num_bytes = 2 * self.numel // self.block_size
        self.shifts = nn.Parameter(self.codes.new_empty(num_bytes), requires_grad=False)

    def product(self, x_NI: Tensor, add_to_NO: Tensor | None = None) -> Tensor:
        sums_NK = x_NI.unflatten(-1, (-1, self.block_size)).sum(-1)
        return addmm_(super().product(x_NI, add_to_NO), sums_NK, self._shift_OK().to(x_NI.dtype).t())

    def product_dx(self, dy_NO: Tensor, add_to_NI: Tensor | None = None) -> Tensor:
        dx_NI = super().product_dx(dy_NO, add_to_NI)
        dx_NI.unflatten(-1, (-1, self.block_size)).add_(mm(dy_NO, self._shift_OK().to(dy_NO.dtype)).unsqueeze(-1))
        return dx_NI

    def dense_weight(self) -> Tensor:
        wide = torch.promote_types(self.dtype, torch.float32)
        weight = dequantize_nf4(self.nf4(), wide).view(self.out_features, self.in_features)
        return self._add_shift_(weight, 0).to(self.dtype)

    def weight_slices(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        for start, rows in super().weight_slices(torch.promote_types(dtype, torch.float32)):
            yield start, self._add_shift_(rows, start).to(dtype)

    def storing(self, weight: Tensor) -> NF4Linear:
        shifts = block_shifts(weight, self.block_size)
        linear = super().storing(shifted(weight, shifts))
        linear.hold("shifts", shifts.view(torch.uint8))
        return linear

    def _add_shift_(self, rows: Tensor, first: int) -> Tensor:
        shift_RK = self._shift_OK()[first : first + len(rows)]
        rows.unflatten(-1, (-1, self.block_size)).add_(shift_RK.unsqueeze(-1))
        return rows

    def _shift_OK(self) -> Tensor:
        """τ, a view in bf16."""
        return self.shifts.data.view(torch.bfloat16).view(self.out_features, -1)
