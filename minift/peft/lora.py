"""LoRA: y = W x + s · B A dropout(x), with W frozen, A (r, in) random, B (out, r) zero at the start.

Paper: Hu et al. 2021, arXiv 2106.09685, eq. 3, s = alpha / r. `rslora`: Kalajdzievski 2023, arXiv 2312.03732, s =
alpha / √r, which keeps the update's size independent of the rank. A starts uniform in ±1/√in (Kaiming with a = √5),
as in PEFT and Microsoft's code; the paper says Gaussian. B = 0 makes the first forward equal to the base model's, and
A ≠ 0 makes the first gradient of B non-zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from minift.model.embedding import Embedding
from minift.model.linear import LinearBase, LowRank
from minift.peft.adapter import Adapter, AdapterConfig
from minift.peft.lora_embedding import LoraEmbedding
from minift.peft.patterns import check_endings, first_match
from minift.peft.peft_json import COMMON, SELECTION, as_int, optional, refuse_unsupported, required

# What PEFT writes beside the settings of minift; `from_peft` supports no other values.
_PEFT_DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "peft_type": "LORA",
    "qalora_group_size": 16,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
# Keys that `from_peft` turns into settings, or checks, or whose value does not change what the stored tensors mean.
_PEFT_UNDERSTOOD = SELECTION | {
    "alpha_pattern", "eva_config", "init_lora_weights", "lora_alpha", "lora_dropout", "lora_ga_config",
    "megatron_core", "qalora_group_size", "r", "rank_pattern", "use_dora", "use_rslora",
}  # fmt: skip
# Initialisations that leave the base weight as it is on disk; PiSSA, OLoRA, LoftQ, LoRA-GA and CorDA change it.
_BASE_PRESERVING_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, kw_only=True)
class LoraConfig(AdapterConfig):
    """Settings of LoRA and rsLoRA.

    r: rank of the update.
    alpha: scale; the update is multiplied by alpha / r, or by alpha / sqrt(r) with `rslora`.
    dropout: probability with which an element of the input is zeroed on its way into A, while training.
    rslora: scale by alpha / sqrt(r), so that high ranks learn as fast as low ones.
    rank_pattern: rank of single projections: {regular expression for the end of the name: r}; the first match counts.
    alpha_pattern: alpha of single projections, likewise.
    allocate: spread the parameters that r everywhere would take so that projections get ranks from 1 to 4 r, more where
        the weight, or the gradient, has more that a low rank can catch (minift/peft/ranks.py); none: r is r.
    gradient_steps: optimizer steps' worth of training data over which such a gradient is averaged, before the first.
    """

    method: Literal["lora"] = "lora"
    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    allocate: Literal["none", "weights", "gradients"] = "none"
    gradient_steps: int = 4

    peft_type = "LORA"
    uses_dora: ClassVar[bool] = False
    """DoRA is a switch of LoRA in PEFT, and a method of its own here: `dora.py`."""
    parameter_names = ("lora_A.weight", "lora_B.weight")
    kinds = (LinearBase, Embedding)

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError(f'targets is {self.targets!r}; valid: "all-linear", a list of names, a regular expression')
        for name, rank in [("r", self.r), *self.rank_pattern.items()]:
            if not isinstance(rank, int) or rank < 1:
                raise ValueError(f"LoRA rank {name} is {rank!r}; valid: an integer >= 1")
        for name, alpha in [("alpha", self.alpha), *self.alpha_pattern.items()]:
            if not (math.isfinite(alpha) and alpha > 0):
                raise ValueError(f"LoRA {name} is {alpha!r}; valid: a finite number > 0")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LoRA dropout is {self.dropout!r}; valid: a number in [0, 1)")
        if self.allocate != "none" and self.rank_pattern:
            raise ValueError(
                f"allocate is {self.allocate} and rank_pattern is {self.rank_pattern}; valid: one of the two, as both "
                "say which rank a projection gets"
            )
        if self.gradient_steps < 1:
            raise ValueError(f"gradient_steps is {self.gradient_steps!r}; valid: an integer >= 1")

    def rank(self, name: str) -> int:
        """Rank of the projection `name`."""
        pattern = first_match(self.rank_pattern, name)
        return self.r if pattern is None else self.rank_pattern[pattern]

    def scale(self, name: str) -> float:
        """Factor on B A for the projection `name`."""
        pattern = first_match(self.alpha_pattern, name)
        alpha = self.alpha if pattern is None else self.alpha_pattern[pattern]
        return alpha / (math.sqrt(self.rank(name)) if self.rslora else self.rank(name))

    def wrap(
        self, name: str, base: LinearBase | Embedding, dtype: torch.dtype, device: torch.device
    ) -> LoraLinear | LoraEmbedding:
        if isinstance(base, Embedding):
            rank = self.fitting_rank(name, base.num_embeddings, base.embedding_dim)
            return LoraEmbedding(base, rank, self.scale(name), dtype, device)
        rank = self.fitting_rank(name, base.in_features, base.out_features)
        return LoraLinear(base, rank, self.scale(name), self.dropout, dtype, device)

    def fitting_rank(self, name: str, in_features: int, out_features: int) -> int:
        """Rank of the module `name`. ValueError if no update of its weight has such a rank."""
        rank, most = self.rank(name), self.most_rank(in_features, out_features)
        if rank > most:
            raise ValueError(
                f"rank {rank} is more than {name} can have with {self.method}, going from {in_features} to "
                f"{out_features}; valid: r of at most {most}, or a rank_pattern for it such as "
                f"{{{name.rpartition('.')[2]}: {most}}}"
            )
        return rank

    def most_rank(self, in_features: int, out_features: int) -> int:
        """The largest rank of an adapter on a module of this size."""
        return min(in_features, out_features)

    @property
    def parameter_sets(self) -> tuple[tuple[str, ...], ...]:
        return self.parameter_names, ("lora_embedding_A", "lora_embedding_B")

    def check(self, names: Sequence[str]) -> None:
        check_endings(self.rank_pattern, names, "rank_pattern")
        check_endings(self.alpha_pattern, names, "alpha_pattern")

    def to_peft(self) -> dict[str, Any]:
        return COMMON | _PEFT_DEFAULTS | self.selection_to_peft() | {
            "alpha_pattern": {pattern: as_int(alpha) for pattern, alpha in self.alpha_pattern.items()},
            "lora_alpha": as_int(self.alpha),
            "lora_dropout": self.dropout,
            "r": self.r,
            "rank_pattern": self.rank_pattern,
            "use_dora": self.uses_dora,
            "use_rslora": self.rslora,
        }

    @classmethod
    def reads(cls, fields: Mapping[str, Any]) -> bool:
        return super().reads(fields) and optional(fields, "use_dora", bool, False) == cls.uses_dora

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> Self:
        if fields.get("init_lora_weights", True) not in _BASE_PRESERVING_INITS:
            raise ValueError(
                f"init_lora_weights is {fields['init_lora_weights']!r}: that initialisation changes the base, so "
                "the adapter alone does not describe the model; convert it to a plain LoRA with PEFT first"
            )
        refuse_unsupported(fields, _PEFT_DEFAULTS, _PEFT_UNDERSTOOD)
        return cls(
            **cls.selection_from_peft(fields),
            r=required(fields, "r", int, "LoRA"),
            alpha=required(fields, "lora_alpha", float, "LoRA"),
            dropout=optional(fields, "lora_dropout", float, 0.0),
            rslora=optional(fields, "use_rslora", bool, False),
            rank_pattern=optional(fields, "rank_pattern", dict[str, int], {}),
            alpha_pattern=optional(fields, "alpha_pattern", dict[str, float], {}),
        )


class LowRankFactor(nn.Module):
    """Holds one factor as `weight`, so that the parameter is named as PEFT names it: `lora_A.weight`."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=dtype, device=device))


class LoraLinear(Adapter):
    """base(x) + scale · B A dropout(x); see the module docstring and `model.low_rank`."""

    def __init__(
        self, base: LinearBase, rank: int, scale: float, dropout: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(base)
        self.scale = scale
        self.dropout = dropout
        self.lora_A = LowRankFactor(rank, base.in_features, dtype, device)
        self.lora_B = LowRankFactor(base.out_features, rank, dtype, device)

    def parts(self) -> tuple[LinearBase, tuple[LowRank, ...]]:
        if self.merged:
            return self.base, ()
        dropout = self.dropout if self.training else 0.0
        return self.base, (LowRank(self.lora_A.weight, self.lora_B.weight, self.scale, dropout),)

    def init_parameter(self, local_name: str, generator: torch.Generator) -> Tensor:
        if local_name == "lora_B.weight":
            return torch.zeros(self.lora_B.weight.shape)
        assert local_name == "lora_A.weight", local_name
        return initial_A(self.lora_A.weight.shape, generator)

    def effective_weight(self, weight: Tensor) -> Tensor:
        A, B = self.lora_A.weight.to(weight.dtype), self.lora_B.weight.to(weight.dtype)
        return torch.addmm(weight, B, A, alpha=self.scale)

    def extra_repr(self) -> str:
        rank, in_features = self.lora_A.weight.shape
        return f"{in_features} -> {self.out_features}, rank={rank}, scale={self.scale:g}, dropout={self.dropout:g}"


def initial_A(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """(r, in), as the module docstring says."""
    bound = 1.0 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
