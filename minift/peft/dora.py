"""DoRA: LoRA turns each row of W, and a trained number is its length.

    y = m ∘ (V x) / ‖V‖ + b,    V = W + s B A,    ‖V‖ the norms of its rows (out,);    m starts at ‖W‖

Paper: Liu et al. 2024, arXiv 2402.09353, eq. 5; section 4.3: ‖V‖ counts as a constant in backward. What is held and
trained is m - ‖W‖, which starts at zero (`stretch` says why); files hold m, as PEFT's do.

V is never formed. W is read once in each forward, a slice that fits the cache at a time, for

    ‖V‖² = ‖W‖² + 2 s ((W Aᵀ) ∘ B) 1 + s² ((B (A Aᵀ)) ∘ B) 1        in fp32, r/T of the work of the projection itself

With dropout PEFT multiplies W with the x that has zeros, too, for what the factor adds, and so does this:

    y = W x + b + (m / ‖V‖ - 1) ∘ W dropout(x) + (m / ‖V‖) ∘ s B A dropout(x)

That is a second product with W, forward and backward: without dropout, training is much faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minift.model.linear import LinearBase, LowRank, project
from minift.peft.lora import LoraConfig, LoraLinear
from minift.peft.stretch import Fixed, stretch_


@dataclass(frozen=True, kw_only=True)
class DoraConfig(LoraConfig):
    """Settings of DoRA: those of LoRA."""

    method: Literal["dora"] = "dora"

    uses_dora = True
    parameter_names = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    kinds = (LinearBase,)

    def wrap(self, name: str, base: LinearBase, dtype: torch.dtype, device: torch.device) -> DoraLinear:
        rank = self.fitting_rank(name, base.in_features, base.out_features)
        return DoraLinear(base, rank, self.scale(name), self.dropout, dtype, device)


class DoraLinear(LoraLinear):
    """`lora_magnitude_vector` (out,): how much longer than in the base each row is."""

    def __init__(self, base: LinearBase, *lora: Any) -> None:
        super().__init__(base, *lora)
        like = self.lora_B.weight
        self.lora_magnitude_vector = nn.Parameter(like.new_empty(base.out_features))
        self._held: dict[torch.dtype, Fixed] | None = None  # while no weight changes

    def parts(self) -> tuple[LinearBase, tuple[LowRank, ...]] | None:
        return None if self._drops and not self.merged else super().parts()

    def after(self, out_NO: Tensor) -> Tensor:
        return out_NO if self.merged else stretch_(out_NO, self.lora_magnitude_vector, self._fixed(out_NO.dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.merged or not self._drops:
            return super().forward(x)
        x_NI = F.dropout(x.reshape(-1, self.in_features), self.dropout)
        update = LowRank(self.lora_A.weight, self.lora_B.weight, self.scale, 0.0)
        base_NO, update_NO = project(x_NI, self.base, _UpdateOnly(self.base, update))
        turned_NO = stretch_(base_NO + update_NO, self.lora_magnitude_vector, self._fixed(x.dtype)) - base_NO
        return self.base(x) + turned_NO.view(*x.shape[:-1], self.out_features)

    @property
    def _drops(self) -> bool:
        return self.training and self.dropout > 0.0

    def hold_weights(self, held: bool) -> None:
        self._held = {} if held else None

    def _fixed(self, dtype: torch.dtype) -> Fixed:
        """What makes m / ‖V‖ - 1 of the trained vector, for a forward in `dtype`."""
        if self._held is None:
            return self._make_fixed(dtype)
        if dtype not in self._held:
            self._held[dtype] = self._make_fixed(dtype)
        return self._held[dtype]

    def _make_fixed(self, dtype: torch.dtype) -> Fixed:
        W_norm_O, V_norm_O = self._norms(torch.promote_types(dtype, torch.float32))
        gain_O = torch.where(V_norm_O > 0.0, 1.0 / V_norm_O, 0.0)  # a row of zeros stays one
        return Fixed(gain_O, (W_norm_O - V_norm_O) * gain_O, self.base.bias)

    @torch.no_grad()
    def _norms(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """‖W‖ and ‖V‖ (out,), in `dtype`: equal to the bit where B is zero."""
        A_RI, B_OR = self.lora_A.weight.to(dtype), self.lora_B.weight.to(dtype)
        squares_O, cross_O = B_OR.new_empty(self.out_features), B_OR.new_empty(self.out_features)
        for start, rows in self.base.weight_slices(dtype):
            part = slice(start, start + len(rows))
            torch.linalg.vector_norm(rows, dim=1, out=squares_O[part])
            torch.sum((rows @ A_RI.t()).mul_(B_OR[part]), dim=1, out=cross_O[part])
        squares_O.square_()
        update_O = ((B_OR @ (A_RI @ A_RI.t())) * B_OR).sum(1)
        turned_O = squares_O + 2.0 * self.scale * cross_O + self.scale**2 * update_O
        return squares_O.sqrt(), turned_O.clamp_(min=0.0).sqrt()

    def init_parameter(self, local_name: str, generator: torch.Generator) -> Tensor:
        if local_name == "lora_magnitude_vector":
            return torch.zeros(self.out_features)
        return super().init_parameter(local_name, generator)

    def to_file(self, local_name: str, values: Tensor, base_weight: Callable[[], Tensor]) -> Tensor:
        return values + _row_norms(base_weight()) if local_name == "lora_magnitude_vector" else values

    def from_file(self, local_name: str, values: Tensor, base_weight: Callable[[], Tensor]) -> Tensor:
        return values - _row_norms(base_weight()) if local_name == "lora_magnitude_vector" else values

    def effective_weight(self, weight: Tensor) -> Tensor:
        turned = super().effective_weight(weight)
        V_norm_O = _row_norms(turned)
        length_O = _row_norms(weight) + self.lora_magnitude_vector.to(weight.dtype)
        return turned.mul_(torch.where(V_norm_O > 0.0, length_O / V_norm_O, 1.0).unsqueeze(1))


class _UpdateOnly(LinearBase):
    """The update without its base."""

    bias = None

    def __init__(self, base: LinearBase, update: LowRank) -> None:
        super().__init__()
        self.out_features, self._update = base.out_features, update

    def parts(self) -> tuple[LinearBase, tuple[LowRank, ...]]:
        return self, (self._update,)

    def product(self, x_NI: Tensor, add_to_NO: Tensor | None = None) -> Tensor:
        assert add_to_NO is not None, "the update comes first"
        return add_to_NO

    def product_dx(self, dy_NO: Tensor, add_to_NI: Tensor | None = None) -> Tensor:
        assert add_to_NI is not None, "the update comes first"
        return add_to_NI


def _row_norms(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))
