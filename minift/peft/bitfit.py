"""BitFit: only biases are trained, and made where the model has none: y = W x + (b + c).

Paper: Ben Zaken et al. 2022, arXiv 2106.10199 (of models that have biases everywhere; in a Llama they are new). What is
held, trained and stored is the change c, which starts at zero. The norms of these models have no bias, and get none.

PEFT has no such method (its `bias: all` is for beside a LoRA), so the files are minift's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from minift.model.linear import LinearBase, LowRank
from minift.peft.adapter import Adapter, AdapterConfig


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(AdapterConfig):
    """Settings of BitFit: which projections have their bias trained."""

    method: Literal["bitfit"] = "bitfit"

    peft_type = "MINIFT_BITFIT"
    parameter_names = ("bias_change",)

    def wrap(self, name: str, base: LinearBase, dtype: torch.dtype, device: torch.device) -> BitFitLinear:
        return BitFitLinear(base, dtype, device)


class BitFitLinear(Adapter):
    """`bias_change` (out,)."""

    def __init__(self, base: LinearBase, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(base)
        self.bias_change = nn.Parameter(torch.empty(base.out_features, dtype=dtype, device=device))

    def parts(self) -> tuple[LinearBase, tuple[LowRank, ...]]:
        return self.base, ()

    def after(self, out_NO: Tensor) -> Tensor:
        return out_NO if self.merged else out_NO.add_(self.bias_change.to(out_NO.dtype))

    def init_parameter(self, local_name: str, generator: torch.Generator) -> Tensor:
        return torch.zeros(self.out_features)

    def effective_weight(self, weight: Tensor) -> Tensor:
        return weight

    def effective_bias(self, bias: nn.Parameter | None) -> nn.Parameter:
        change = self.bias_change.detach()
        return nn.Parameter(change if bias is None else bias.detach() + change.to(bias.dtype), requires_grad=False)
