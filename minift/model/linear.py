"""Projections: y = x Wᵀ + b, however W is stored.

`LinearBase` is what dense, quantized and adapter-wrapped projections share. A new way to store a weight is a subclass
that says how to multiply with it, `product` and `product_dx`, and needs to know nothing of autograd or adapters: that
is `project`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from minift.model.low_rank import LowRank
from minift.model.project import project
from minift.ops.matmul import addmm_, linear, mm


class LinearBase(nn.Module):
    """A projection from `in_features` to `out_features`, however its weight is stored.

    A subclass that stores a weight has a `bias` and writes `product`, `product_dx`, `dense_weight` and, to be merged
    into, `storing`. One that wraps another projection writes `dense_weight` and `parts`, perhaps `after`, or its own
    `forward` where these cannot tell.
    """

    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        return project(x, self)[0]

    def parts(self) -> tuple[LinearBase, tuple[LowRank, ...]] | None:
        """A projection with `product`s and updates, of whose sum `after` makes this one; None: only `forward` knows."""
        return self, ()

    def after(self, out_NO: Tensor) -> Tensor:
        """This projection's output, a differentiable function of the sum of its parts: the sum itself, as a rule."""
        return out_NO

    @property
    def has_after(self) -> bool:
        """Whether there is such a function, which may read the sum."""
        return type(self).after is not LinearBase.after

    def product(self, x_NI: Tensor, add_to_NO: Tensor | None = None) -> Tensor:
        """x Wᵀ + b, a fresh (N, out_features) in x's dtype; or x Wᵀ added in place to `add_to_NO`, which has b in it
        and is returned. Runs without autograd, like the next."""
        raise NotImplementedError

    def product_dx(self, dy_NO: Tensor, add_to_NI: Tensor | None = None) -> Tensor:
        """dy W: a fresh (N, in_features), or added to `add_to_NI` in place, which is returned."""
        raise NotImplementedError

    def dense_parameter(self) -> nn.Parameter | None:
        """W, where it is one dense parameter and may be trained: its gradient is dyᵀ x."""
        return None

    def dense_weight(self) -> Tensor:
        """The weight (out_features, in_features) without gradient history: itself where it is dense, else a copy."""
        raise NotImplementedError

    def weight_slices(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows in `dtype`) of the weight from top to bottom, as many at a time as a cache holds; without
        gradient history, and each good until the next is asked for."""
        raise NotImplementedError

    def storing(self, weight: Tensor) -> LinearBase:
        """A projection like this one, with the same bias, that holds `weight` (any float dtype), frozen and rounded to
        this one's format."""
        raise NotImplementedError


class Linear(LinearBase):
    """Dense projection; parameters are named as in `nn.Linear` and start uninitialised."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    def product(self, x_NI: Tensor, add_to_NO: Tensor | None = None) -> Tensor:
        if add_to_NO is None:
            return linear(x_NI, self.weight, self.bias)
        return addmm_(add_to_NO, x_NI, self.weight.t())

    def product_dx(self, dy_NO: Tensor, add_to_NI: Tensor | None = None) -> Tensor:
        return mm(dy_NO, self.weight) if add_to_NI is None else addmm_(add_to_NI, dy_NO, self.weight)

    def dense_parameter(self) -> nn.Parameter:
        return self.weight

    def dense_weight(self) -> Tensor:
        return self.weight.detach()

    def weight_slices(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        weight = self.weight.detach()
        rows = self.out_features if weight.dtype == dtype else rows_in_cache(weight.shape, dtype, weight.device)
        for start in range(0, self.out_features, rows):
            yield start, weight[start : start + rows].to(dtype)

    def storing(self, weight: Tensor) -> Linear:
        return Linear.holding(weight.to(self.weight.dtype), self.bias)

    @staticmethod
    def holding(weight: Tensor, bias: nn.Parameter | None) -> Linear:
        """A projection with these two, themselves, the weight frozen."""
        with torch.device("meta"):
            linear = Linear(weight.shape[1], weight.shape[0])
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = bias
        return linear

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, bias={self.bias is not None}"


def rows_in_cache(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> int:
    """How many rows of a weight (out, in) to convert at a time: what fits a cache, or keeps a GPU busy."""
    slice_bytes = 1 << 20 if device.type == "cpu" else 64 << 20
    return min(shape[0], max(1, slice_bytes // (shape[1] * dtype.itemsize)))
