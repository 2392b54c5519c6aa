"""LoRA that does not start at zero: A and B start at A₀ and B₀, which the base gives up.

    y = (W - s B₀ A₀) x + s B A x          s as in LoRA; W - s B₀ A₀, the residual, is frozen

The first forward is the base model's, as with LoRA, but both factors get a gradient that means something from the first
step on. What A₀ and B₀ are is the method: `pissa.py`, `lora_ga.py`. Training is LoRA on another base, to the byte and
the second. The residual is made while weights are read (`checkpoint.initial`); on disk the base stays as it is, since

    W + ΔW = W + s (B A - B₀ A₀)    is a LoRA of twice the rank:    [A; A₀] (2r, in),    [B, -B₀] (out, 2r)

That is what a run exports (`for_original_base`), and PEFT and everybody else can read; PEFT's
`path_initial_model_for_weight_conversion` writes the same.

A base in 4 bits cannot give up just that. Either it is the residual that is quantised (`quantizes_residual`): then the
adapter is for another base than the folder has, and that is exported beside it. Or the base keeps its bits, A₀ and B₀
stay beside A and B, frozen, and

    y = W x + s B A x - s B₀ A₀ x

is the same but for rounding, and r (in + out) more products a token. The export is that of dense bases.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NoReturn

import torch
from torch import Tensor

from minift.model.linear import Linear, LinearBase, LowRank
from minift.peft.adapter import BaseWeight
from minift.peft.lora import LoraConfig, LoraLinear, LowRankFactor

FACTORS = ("lora_A.weight", "lora_B.weight")


def starts_as(name: str) -> str:
    """Of a parameter that keeps A₀ or B₀: the one that starts there. Any other starts as itself."""
    module, _, local_name = name.rpartition(".initial_")
    return f"{module}.lora_{local_name}" if module else name


@dataclass(frozen=True)
class Spectrum:
    """The largest singular values of a matrix (out, in), and their vectors: U (out, k), S (k,) falling, V (in, k).

    square_norm: sum of the squares of all elements, as far as it is known.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    square_norm: float

    @classmethod
    def first(cls, count: int, U: Tensor, S: Tensor, V: Tensor, square_norm: float) -> Spectrum:
        """The first `count` of what a decomposition gives, on the CPU. It leaves the sign of each pair of vectors to
        rounding: here the largest element of each column of V is positive."""
        U, S, V = (part[..., :count].cpu() for part in (U, S, V))
        signs = V.gather(0, V.abs().argmax(0, keepdim=True)).sign()
        return cls(U * signs, S, V * signs, square_norm)


@dataclass(frozen=True, kw_only=True)
class ResidualLoraConfig(LoraConfig):
    """Settings of a method that says what A₀ and B₀ are."""

    kinds = (LinearBase,)
    source: ClassVar[Literal["weights", "gradients"]]
    """Of which matrix of each projection `factors` needs the spectrum."""
    directions_per_rank: ClassVar[int] = 1
    """How many singular vectors it needs for each rank."""
    quantizes_residual: ClassVar[bool] = False
    """Where weights are quantised while they are read: whether it is the residual that is quantised."""

    @abstractmethod
    def factors(self, name: str, spectrum: Spectrum) -> tuple[Tensor, Tensor]:
        """A₀ (r, in) and B₀ (out, r) of the projection `name`, fp32."""

    def wrap(self, name: str, base: LinearBase, dtype: torch.dtype, device: torch.device) -> ResidualLoraLinear:
        if device.type != "meta":
            raise ValueError(
                f"{self.method} takes its initial values out of the base, and {name} is in memory already; valid: lora "
                "here, or a run of its own, which reads the base anew and exports a lora that can be added"
            )
        rank = self.fitting_rank(name, base.in_features, base.out_features)
        gives_up = isinstance(base, Linear) or self.quantizes_residual
        kind = ResidualLoraLinear if gives_up else SubtractedLoraLinear
        return kind(base, rank, self.scale(name), self.dropout, dtype, device)

    def most_rank(self, in_features: int, out_features: int) -> int:
        """Half of LoRA's: what is exported has twice the rank, and must fit."""
        return super().most_rank(in_features, out_features) // 2

    def for_original_base(self, tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `original_config` needs for the trained `tensors` {in-memory name: values}, with A₀ and B₀ by the same
        names in `initial`; others are passed on."""
        doubled = {}
        for name, values in tensors.items():
            if name.endswith(FACTORS[0]):
                doubled[name] = torch.cat([values, initial[name].to(values)])
            elif name.endswith(FACTORS[1]):
                doubled[name] = torch.cat([values, -initial[name].to(values)], dim=1)
            else:
                doubled[name] = values
        return doubled

    def original_config(self) -> LoraConfig:
        """The LoRA of twice the rank, on the original base, with the same scale."""
        shared = {f.name: getattr(self, f.name) for f in fields(LoraConfig) if f.name != "method"}
        grows = math.sqrt(2.0) if self.rslora else 2.0
        return LoraConfig(
            **shared
            | {
                "r": 2 * self.r,
                "alpha": grows * self.alpha,
                "rank_pattern": {pattern: 2 * rank for pattern, rank in self.rank_pattern.items()},
                "alpha_pattern": {pattern: grows * alpha for pattern, alpha in self.alpha_pattern.items()},
            }
        )

    @classmethod
    def reads(cls, fields: Mapping[str, Any]) -> bool:
        """None: what is stored is LoRA."""
        return False


class ResidualLoraLinear(LoraLinear):
    """LoRA whose initial values come with its base."""

    def init_from_base(self, local_name: str, generator: torch.Generator, base_weight: BaseWeight) -> NoReturn:
        raise ValueError(
            "this method takes its initial values out of the base, which must be read with them: build_model(initial=)"
        )


class SubtractedLoraLinear(ResidualLoraLinear):
    """On a base that keeps its weight: `initial_A` and `initial_B`, which are frozen, undo the start."""

    def __init__(
        self, base: LinearBase, rank: int, scale: float, dropout: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(base, rank, scale, dropout, dtype, device)
        self.initial_A = LowRankFactor(rank, base.in_features, dtype, device).requires_grad_(False)
        self.initial_B = LowRankFactor(base.out_features, rank, dtype, device).requires_grad_(False)

    def parts(self) -> tuple[LinearBase, tuple[LowRank, ...]]:
        base, updates = super().parts()
        if self.merged:
            return base, ()
        return base, (*updates, LowRank(self.initial_A.weight, self.initial_B.weight, -self.scale, 0.0))

    def effective_weight(self, weight: Tensor) -> Tensor:
        A, B = self.initial_A.weight.to(weight.dtype), self.initial_B.weight.to(weight.dtype)
        return torch.addmm(super().effective_weight(weight), B, A, alpha=-self.scale)
