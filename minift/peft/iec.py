"""IEC, the elastic connection of IR-QLoRA: LoRA whose two factors also pass on what they read, without parameters.

    y = W x + s (B u + β₂ expand(u)),    u = A dropout(x) + β₁ pool(x)

pool (in -> r) is the mean of each of r equal pieces; expand (r -> out) repeats each number out / r times. β₁ and β₂ are
trained numbers that start at zero, so it starts as LoRA. Both operations are matrices, P and E, and the whole is one,

    ΔW = s (B + β₂ E) (A + β₁ P)

so a file holds it as the LoRA that it amounts to, which PEFT reads. Checkpoints keep the four apart.

Paper: Qin et al. 2024, arXiv 2402.05445, section 3.3, for r that divides in and out, as in the authors' code. Its other
half, ICQ, is `minift/quant/icq.py`; each works without the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minift.model.linear import Linear, LinearBase, LowRank
from minift.peft.adapter import Adapter
from minift.peft.lora import LoraConfig, initial_A


@dataclass(frozen=True, kw_only=True)
class IecConfig(LoraConfig):
    """Settings of IEC: those of LoRA. r must divide the features of every projection, in and out."""

    method: Literal["iec"] = "iec"

    parameter_names = ("lora_A.weight", "lora_B.weight", "beta_1", "beta_2")
    kinds = (LinearBase,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allocate != "none":
            raise ValueError(
                f"allocate is {self.allocate}, which gives any rank, and iec needs ranks that divide the features; "
                "valid: allocate none, with a rank_pattern if ranks are to differ"
            )

    def wrap(self, name: str, base: LinearBase, dtype: torch.dtype, device: torch.device) -> IecLinear:
        rank = self.fitting_rank(name, base.in_features, base.out_features)
        if base.in_features % rank or base.out_features % rank:
            raise ValueError(
                f"rank {rank} does not divide {name}, which goes from {base.in_features} to {base.out_features}, and "
                "iec cuts both into r equal pieces; valid: a divisor of both, a rank_pattern for it, or exclude it"
            )
        return IecLinear(base, rank, self.scale(name), self.dropout, dtype, device)

    @property
    def parameter_sets(self) -> tuple[tuple[str, ...], ...]:
        return (self.parameter_names,)

    @classmethod
    def reads(cls, fields: Mapping[str, Any]) -> bool:
        """None: what is stored is LoRA."""
        return False

    def to_stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        folded = dict(tensors)
        for module in self.adapted_modules(tensors):
            A, B, beta_1, beta_2 = (folded.pop(f"{module}.{local_name}") for local_name in self.parameter_names)
            folded[f"{module}.lora_A.weight"], folded[f"{module}.lora_B.weight"] = fold(A, B, beta_1, beta_2)
        return LoraConfig(targets=self.targets, modules_to_save=self.modules_to_save).to_stored(folded)


class IecLinear(Adapter):
    """`beta_1` and `beta_2` (1,): how much of what each factor reads goes past it."""

    def __init__(
        self, base: LinearBase, rank: int, scale: float, dropout: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(base)
        self.rank, self.scale, self.dropout = rank, scale, dropout
        with device:
            self.lora_A = Linear(base.in_features, rank).to(dtype)
            self.lora_B = Linear(rank, base.out_features).to(dtype)
            self.beta_1 = nn.Parameter(torch.empty(1, dtype=dtype))
            self.beta_2 = nn.Parameter(torch.empty(1, dtype=dtype))

    def parts(self) -> tuple[LinearBase, tuple[LowRank, ...]] | None:
        return (self.base, ()) if self.merged else None

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return super().forward(x)
        pooled = x.unflatten(-1, (self.rank, -1)).mean(-1)
        u = self.lora_A(F.dropout(x, self.dropout, self.training)) + self.beta_1.to(x.dtype) * pooled
        u = self.scale * u  # while it is narrow
        passed = (self.beta_2.to(x.dtype) * u).unsqueeze(-1)
        update = (self.lora_B(u).unflatten(-1, (self.rank, -1)) + passed).flatten(-2)
        return self.base(x) + update

    def init_parameter(self, local_name: str, generator: torch.Generator) -> Tensor:
        if local_name == "lora_A.weight":
            return initial_A(self.lora_A.weight.shape, generator)
        return torch.zeros(self.get_parameter(local_name).shape)

    def effective_weight(self, weight: Tensor) -> Tensor:
        own = (self.lora_A.weight, self.lora_B.weight, self.beta_1, self.beta_2)
        A, B = fold(*(parameter.to(weight.dtype) for parameter in own))
        return torch.addmm(weight, B, A, alpha=self.scale)

    def extra_repr(self) -> str:
        sizes = f"{self.in_features} -> {self.out_features}, rank={self.rank}"
        return f"{sizes}, scale={self.scale:g}, dropout={self.dropout:g}"


def fold(A: Tensor, B: Tensor, beta_1: Tensor, beta_2: Tensor) -> tuple[Tensor, Tensor]:
    """A + β₁ P (r, in) and B + β₂ E (out, r): the factors of the LoRA that it is."""
    rank, in_features = A.shape
    eye = torch.eye(rank, dtype=A.dtype, device=A.device)
    P = eye.repeat_interleave(in_features // rank, dim=1) * (rank / in_features)
    E = eye.repeat_interleave(len(B) // rank, dim=0)
    return A + beta_1 * P, B + beta_2 * E
