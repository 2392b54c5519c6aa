"""IA3: keys, values and the hidden units of the MLP are scaled, one trained number each.

    y = l ∘ (W x + b)        k_proj, v_proj: after the projection
    y = W (l ∘ x) + b        down_proj: before it, where the hidden units are

Paper: Liu et al. 2022, arXiv 2205.05638, section 3.3. l starts at one. What is held and trained is l - 1, which starts
at zero (`stretch` says why); files hold l, as PEFT's do. (So weight decay, if there is any, pulls l towards one, where
the base model is, and not towards zero.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from minift.model.linear import LinearBase, LowRank
from minift.peft.adapter import Adapter, AdapterConfig
from minift.peft.patterns import check_modules, matches
from minift.peft.peft_json import COMMON, SELECTION, in_order, optional, refuse_unsupported
from minift.peft.stretch import stretch, stretch_

_PEFT_DEFAULTS: dict[str, Any] = {
    "fan_in_fan_out": False,
    "init_ia3_weights": True,
    "peft_type": "IA3",
}
_PEFT_UNDERSTOOD = SELECTION | {"feedforward_modules", "init_ia3_weights"}


@dataclass(frozen=True, kw_only=True)
class IA3Config(AdapterConfig):
    """Settings of IA3.

    targets: which projections are scaled, named as for LoRA; by default those of the paper, under Llama's names.
    feedforward: those of them whose input is scaled; the others' output is.
    """

    method: Literal["ia3"] = "ia3"
    targets: str | list[str] = field(default_factory=lambda: ["k_proj", "v_proj", "down_proj"])
    feedforward: str | list[str] = field(default_factory=lambda: ["down_proj"])

    peft_type = "IA3"
    parameter_names = ("ia3_l",)

    def wrap(self, name: str, base: LinearBase, dtype: torch.dtype, device: torch.device) -> IA3Linear:
        return IA3Linear(base, matches(name, self.feedforward), dtype, device)

    def check(self, names: Sequence[str]) -> None:
        check_modules(names, self.feedforward, "feedforward")

    def to_peft(self) -> dict[str, Any]:
        feedforward = {"feedforward_modules": in_order(self.feedforward)}
        return COMMON | _PEFT_DEFAULTS | self.selection_to_peft() | feedforward

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> Self:
        refuse_unsupported(fields, _PEFT_DEFAULTS, _PEFT_UNDERSTOOD)
        feedforward = optional(fields, "feedforward_modules", str | list[str], [])
        return cls(**cls.selection_from_peft(fields), feedforward=feedforward)


class IA3Linear(Adapter):
    """`ia3_l`, less one: (out, 1), or (1, in) where the input is scaled; shapes are PEFT's."""

    def __init__(self, base: LinearBase, scales_input: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(base)
        self.scales_input = scales_input
        shape = (1, base.in_features) if scales_input else (base.out_features, 1)
        self.ia3_l = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

    def parts(self) -> tuple[LinearBase, tuple[LowRank, ...]] | None:
        return None if self.scales_input and not self.merged else (self.base, ())

    def forward(self, x: Tensor) -> Tensor:
        if self.merged or not self.scales_input:
            return super().forward(x)
        # Not reshaped without need: recomputation knows a result that it can make again by the tensor itself.
        x_NI = x if x.ndim == 2 else x.reshape(-1, self.in_features)
        return self.base(stretch(x_NI, self.ia3_l).view(x.shape))

    def after(self, out_NO: Tensor) -> Tensor:
        return out_NO if self.merged else stretch_(out_NO, self.ia3_l)

    def init_parameter(self, local_name: str, generator: torch.Generator) -> Tensor:
        return torch.zeros(self.ia3_l.shape)

    def to_file(self, local_name: str, values: Tensor, base_weight: Callable[[], Tensor]) -> Tensor:
        return 1.0 + values

    def from_file(self, local_name: str, values: Tensor, base_weight: Callable[[], Tensor]) -> Tensor:
        return values - 1.0

    def effective_weight(self, weight: Tensor) -> Tensor:
        return torch.addcmul(weight, weight, self.ia3_l.to(weight.dtype))

    def effective_bias(self, bias: nn.Parameter | None) -> nn.Parameter | None:
        if bias is None or self.scales_input:
            return bias
        scaled = torch.addcmul(bias, bias, self.ia3_l.detach().view(-1).to(bias.dtype))
        return nn.Parameter(scaled.detach(), requires_grad=False)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, scales its {'input' if self.scales_input else 'output'}"
