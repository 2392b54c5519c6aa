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
from typing import Any, Self

import torch
from torch import Tensor, nn

from minift.model.linear import LinearBase, LowRank
from minift.peft.adapter import Adapter, AdapterConfig
from minift.peft.patterns import check_endings, first_match

# `adapter_config.json` as PEFT 0.21.2 writes it, less what `to_peft` sets. `from_peft` supports no other values.
_PEFT_DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
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
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "revision": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "velora_config": None,
}
# Keys that `from_peft` turns into settings, or checks.
_PEFT_OWN = {
    "alpha_pattern", "exclude_modules", "init_lora_weights", "lora_alpha", "lora_dropout", "r", "rank_pattern",
    "target_modules", "use_rslora",
}  # fmt: skip
# Keys whose value does not change what the stored tensors mean, so any value is accepted.
_PEFT_INFORMATIVE = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "task_type",
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
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    parameter_names = ("lora_A.weight", "lora_B.weight")

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

    def rank(self, name: str) -> int:
        """Rank of the projection `name`."""
        pattern = first_match(self.rank_pattern, name)
        return self.r if pattern is None else self.rank_pattern[pattern]

    def scale(self, name: str) -> float:
        """Factor on B A for the projection `name`."""
        pattern = first_match(self.alpha_pattern, name)
        alpha = self.alpha if pattern is None else self.alpha_pattern[pattern]
        return alpha / (math.sqrt(self.rank(name)) if self.rslora else self.rank(name))

    def wrap(self, name: str, base: LinearBase, dtype: torch.dtype, device: torch.device) -> LoraLinear:
        return LoraLinear(base, self.rank(name), self.scale(name), self.dropout, dtype, device)

    def check(self, names: Sequence[str]) -> None:
        check_endings(self.rank_pattern, names, "rank_pattern")
        check_endings(self.alpha_pattern, names, "alpha_pattern")

    def to_peft(self) -> dict[str, Any]:
        return _PEFT_DEFAULTS | {
            "alpha_pattern": {pattern: _as_int(alpha) for pattern, alpha in self.alpha_pattern.items()},
            "exclude_modules": _sorted(self.exclude),
            "lora_alpha": _as_int(self.alpha),
            "lora_dropout": self.dropout,
            "r": self.r,
            "rank_pattern": self.rank_pattern,
            "target_modules": _sorted(self.targets),
            "use_rslora": self.rslora,
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> Self:
        for key in ("r", "lora_alpha", "target_modules"):
            if fields.get(key) is None:
                raise ValueError(f"adapter_config.json has no {key!r}, which LoRA needs")
        if fields.get("init_lora_weights", True) not in _BASE_PRESERVING_INITS:
            raise ValueError(
                f"init_lora_weights is {fields['init_lora_weights']!r}: that initialisation changes the base, so "
                "the adapter alone does not describe the model; convert it to a plain LoRA with PEFT first"
            )
        for key, value in fields.items():
            if key in _PEFT_OWN or key in _PEFT_INFORMATIVE or value == _PEFT_DEFAULTS.get(key) or not value:
                continue
            raise ValueError(f"adapter_config.json sets {key!r} to {value!r}, which minift does not support")
        return cls(
            targets=fields["target_modules"],
            exclude=fields.get("exclude_modules"),
            r=fields["r"],
            alpha=fields["lora_alpha"],
            dropout=fields.get("lora_dropout", 0.0),
            rslora=fields.get("use_rslora", False),
            rank_pattern=fields.get("rank_pattern") or {},
            alpha_pattern=fields.get("alpha_pattern") or {},
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
        bound = 1.0 / math.sqrt(self.in_features)
        return torch.empty(self.lora_A.weight.shape).uniform_(-bound, bound, generator=generator)

    def effective_weight(self, weight: Tensor) -> Tensor:
        A, B = self.lora_A.weight.to(weight.dtype), self.lora_B.weight.to(weight.dtype)
        return torch.addmm(weight, B, A, alpha=self.scale)

    def extra_repr(self) -> str:
        rank, in_features = self.lora_A.weight.shape
        return f"{in_features} -> {self.out_features}, rank={rank}, scale={self.scale:g}, dropout={self.dropout:g}"


def _as_int(value: float) -> int | float:
    """16.0 -> 16: PEFT writes alpha as an integer, and readers less lenient than PEFT expect one."""
    return int(value) if float(value).is_integer() else value


def _sorted(patterns: str | list[str] | None) -> str | list[str] | None:
    return sorted(patterns) if isinstance(patterns, (list, tuple)) else patterns
