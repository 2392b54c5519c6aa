"""Bottleneck adapter: a small network behind a projection, with a bridge around it.

    y = z + U σ(D z + d) + u,    z = W x + b,    D (size, out), U (out, size)

Papers: Houlsby et al. 2019, arXiv 1902.00751, section 2.1: behind the attention's output projection and behind the MLP,
each before the residual is added (`targets: [o_proj, down_proj]`); Pfeiffer et al. 2021, arXiv 2005.00247: behind the
MLP alone. They start near the identity, U and D small; here U, u and d start at zero, so that it is the identity, and D
as LoRA's A does.

It is not linear, so it cannot be merged, and costs time in generation too. PEFT has no such method; the files are
minift's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from minift.model.linear import Linear, LinearBase, LowRank
from minift.peft.adapter import Adapter, AdapterConfig

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(AdapterConfig):
    """Settings of bottleneck adapters.

    targets: behind which projections they stand, named as for LoRA.
    size: width of the bottleneck.
    activation: what stands between the two matrices.
    """

    method: Literal["bottleneck"] = "bottleneck"
    targets: str | list[str] = field(default_factory=lambda: ["o_proj", "down_proj"])
    size: int = 64
    activation: Literal["relu", "gelu", "silu"] = "gelu"

    peft_type = "MINIFT_BOTTLENECK"
    parameter_names = ("adapter_down.weight", "adapter_down.bias", "adapter_up.weight", "adapter_up.bias")

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"bottleneck size is {self.size}; valid: 1 or more")
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"bottleneck activation is {self.activation!r}; valid: {', '.join(_ACTIVATIONS)}")

    def wrap(self, name: str, base: LinearBase, dtype: torch.dtype, device: torch.device) -> BottleneckLinear:
        return BottleneckLinear(base, self.size, self.activation, dtype, device)


class BottleneckLinear(Adapter):
    """`adapter_down`, D and d; `adapter_up`, U and u."""

    def __init__(
        self, base: LinearBase, size: int, activation: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(base)
        self.activation = activation
        with device:
            self.adapter_down = Linear(base.out_features, size, bias=True).to(dtype)
            self.adapter_up = Linear(size, base.out_features, bias=True).to(dtype)

    def parts(self) -> tuple[LinearBase, tuple[LowRank, ...]]:
        return self.base, ()

    def after(self, out_NO: Tensor) -> Tensor:
        hidden_NS = _ACTIVATIONS[self.activation](self.adapter_down(out_NO))
        return self.adapter_up(hidden_NS).add_(out_NO)

    def init_parameter(self, local_name: str, generator: torch.Generator) -> Tensor:
        shape = self.get_parameter(local_name).shape
        if local_name != "adapter_down.weight":
            return torch.zeros(shape)
        bound = 1.0 / math.sqrt(self.out_features)
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    def extra_repr(self) -> str:
        size = self.adapter_down.out_features
        return f"{self.in_features} -> {self.out_features} -> {size} -> {self.out_features}, {self.activation}"
