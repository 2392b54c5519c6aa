"""One LoRA out of several: weighted sums of their updates, exact or cut to a rank, with or without pruning first.

An update is s B A. What is combined are either whole updates, and the result is cut to a rank by SVD, or the factors,
each for itself, which needs equal ranks and is another thing than the sum: (B₁ + B₂)(A₁ + A₂) has products of one's B
with the other's A. Names and meanings are those of PEFT's `add_weighted_adapter`:

    cat                     Σ w ΔW, exactly: factors side by side, so ranks add up
    svd                     the nearest to that of a smaller rank
    ties_svd, dare_*_svd,   whole updates, pruned and combined as below, then the nearest of a rank
    magnitude_prune_svd
    linear                  factors, added up with √w each
    ties                    of each factor the largest values stay (`density` of them), a sign is elected for each
                            place, and those that have it are averaged: Yadav et al. 2023, arXiv 2306.01708
    dare_linear, dare_ties  values are dropped at random, the others divided by `density`: Yu et al. 2023, arXiv
                            2311.03099
    magnitude_prune         as ties, without signs: added up

As in PEFT, a TIES average is over values that are multiplied by their weights, and a sign is elected before that.
Files: `checkpoint.combine`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from minift.peft.inject import named_generator

CombineMethod = Literal[
    "cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune",
    "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Combination:
    """How to combine.

    method: see the module docstring.
    rank: of the result, for svd and *_svd; the largest of the inputs if None.
    density: share of values that pruning keeps, in (0, 1].
    seed: of what dare drops.
    """

    method: CombineMethod = "svd"
    rank: int | None = None
    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(CombineMethod):
            raise ValueError(f"the method is {self.method!r}; valid: {', '.join(get_args(CombineMethod))}")
        if self.rank is not None and (self.rank < 1 or not self.of_updates):
            valid = "1 or more" if self.of_updates else "none: only svd and *_svd have a choice"
            raise ValueError(f"the rank for {self.method} is {self.rank}; valid: {valid}")
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"the density is {self.density}; valid: above 0 up to 1")

    @property
    def of_updates(self) -> bool:
        return self.method.endswith("svd")

    @property
    def rule(self) -> str:
        """What is done with tensors, be they updates or factors."""
        return self.method.removesuffix("_svd")


@dataclass(frozen=True)
class Update:
    """scale · B A, with A (r, in) and B (out, r)."""

    A: Tensor
    B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return len(self.A)


def combine(
    name: str, updates: Sequence[Update], weights: Sequence[float], how: Combination
) -> tuple[Tensor, Tensor]:
    """A and B, fp32, of one update with the scale 1. `name`: of the module, for errors and random numbers."""
    factors = [weight * update.scale for weight, update in zip(weights, updates, strict=True)]
    A_RI = torch.cat([factor * update.A.float() for factor, update in zip(factors, updates, strict=True)])
    B_OR = torch.cat([update.B.float() for update in updates], dim=1)
    if how.method == "cat":
        return A_RI, B_OR
    ranks = [update.rank for update in updates]
    rank = min(how.rank or max(ranks), A_RI.shape[1], len(B_OR))
    if how.method == "svd":
        return nearest_of_rank(A_RI, B_OR, rank)
    if how.of_updates:
        dense = [update.scale * update.B.double() @ update.A.double() for update in updates]
        U, S, Vh = torch.linalg.svd(_apply_rule(f"{name}.update", dense, weights, how), full_matrices=False)
        return Vh[:rank].float(), (U[:, :rank] * S[:rank]).float()
    if len(set(ranks)) > 1:
        raise ValueError(
            f"{name} has ranks {', '.join(map(str, ranks))}, and {how.method} adds factors up; valid: cat, svd or a "
            "*_svd method"
        )
    roots = [math.sqrt(abs(factor)) for factor in factors]
    signed = [math.copysign(root, factor) for root, factor in zip(roots, factors, strict=True)]
    return (
        _apply_rule(f"{name}.A", [update.A.float() for update in updates], signed, how),
        _apply_rule(f"{name}.B", [update.B.float() for update in updates], roots, how),
    )


def nearest_of_rank(A_RI: Tensor, B_OR: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors (fp32) of the matrix of at most `rank` that is nearest to B A, which is never formed: an SVD of R².
    A's rows are orthonormal, and B has the singular values, in descending order."""
    Q_out, R_out = torch.linalg.qr(B_OR.double())
    Q_in, R_in = torch.linalg.qr(A_RI.double().t())
    U, S, Vh = torch.linalg.svd(R_out @ R_in.t(), full_matrices=False)
    return (Vh[:rank] @ Q_in.t()).float(), (Q_out @ (U[:, :rank] * S[:rank])).float()


def _apply_rule(name: str, tensors: Sequence[Tensor], weights: Sequence[float], how: Combination) -> Tensor:
    """One tensor of several of the same shape."""
    if how.rule.startswith("dare"):
        tensors = [
            _drop(tensor, how.density, named_generator(how.seed, f"{name}.{index}"))
            for index, tensor in enumerate(tensors)
        ]
    elif how.rule != "linear":
        tensors = [_keep_largest(tensor, how.density) for tensor in tensors]
    stacked = torch.stack(list(tensors))
    weighted = stacked * torch.tensor(weights, dtype=stacked.dtype).view(-1, *[1] * tensors[0].ndim)
    if "ties" not in how.rule:
        return weighted.sum(0)
    elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agrees = stacked.sign() == elected
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _keep_largest(tensor: Tensor, density: float) -> Tensor:
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    return torch.zeros_like(tensor).view(-1).index_copy_(0, kept, tensor.flatten()[kept]).view_as(tensor)


def _drop(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    kept = torch.rand(tensor.shape, generator=generator) < density
    return tensor * kept / density
