"""What happened to one weight W (out, in), which has become W' = W + ΔW: its singular vectors, size and direction.

*Intruder dimensions*: left singular vectors of W', among those of the `top` largest singular values, whose cosine
with every one of W's is below `threshold`. Shuttleworth et al. 2024, arXiv 2410.21228, algorithm 1: LoRA makes them,
full fine-tuning hardly does, and what a model forgets goes with them. Scaling one by λ replaces its σ u vᵀ in W' by
λ σ u vᵀ.

*Effective rank* of ΔW: exp of the entropy of its singular values as shares of their sum; Roy and Vetterli 2007.

*Amplification factor*: ‖ΔW‖ / ‖Uᵀ W V‖, with the singular directions U, V of ΔW, as many as its rank. Hu et al. 2021,
arXiv 2106.09685, section 7.3: large where training enlarged directions that W has, but little of.

*Change of magnitude and direction*: mean over the rows of |‖w'‖ - ‖w‖|, and of 1 - cos(w', w). Liu et al. 2024, arXiv
2402.09353, eq. 3 and 4, with rows as in PEFT and `peft.dora`.

Decompositions go through the smaller Gram matrix in fp64, which is faster than an SVD: singular values are right to
1e-8 of the largest, and what is smaller counts as zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALLEST = 1e-7  # of the largest singular value: what is left of zero


@dataclass(frozen=True)
class Intruder:
    """index: place of its singular value in W', from 0. similarity: the largest cosine with one of W's vectors.
    base_share: ‖uᵀ W‖ / σ, how much of uᵀ W' = σ vᵀ the base has without any training; scaling takes away of that, too.
    """

    index: int
    singular_value: float
    similarity: float
    base_share: float


@dataclass(frozen=True, eq=False)
class Intruders:
    """Those of one weight, the largest first: figures; σ u as columns (out, n) and v as rows (n, in), in fp64."""

    found: tuple[Intruder, ...]
    columns: Tensor
    rows: Tensor


@dataclass(frozen=True)
class WeightAnalysis:
    """Of one weight; see the module docstring. update_ratio: ‖ΔW‖ / ‖W‖, Frobenius norms. amplification: infinite if W
    has nothing in the directions of ΔW."""

    name: str
    intruders: tuple[Intruder, ...]
    effective_rank: float
    amplification: float
    update_ratio: float
    magnitude_change: float
    direction_change: float


def analyze_weight(name: str, before: Tensor, after: Tensor, intruders: Sequence[Intruder]) -> WeightAnalysis:
    """`before` and `after`: (out, in), any float dtype; `intruders`: what `find_intruders` found."""
    assert before.shape == after.shape and before.ndim == 2
    before, after = before.double(), after.double()
    update = after - before
    U, S, V = svd(update)
    rank = int((S > 0).sum())
    inside = torch.linalg.matrix_norm(U[:, :rank].t() @ before @ V[:, :rank]).item()
    update_norm, length_O, new_length_O = S.norm().item(), before.norm(dim=1), after.norm(dim=1)
    cosine_O = F.cosine_similarity(before, after, dim=1)
    return WeightAnalysis(
        name,
        tuple(intruders),
        effective_rank(S),
        update_norm / inside if inside > 0.0 else (math.inf if rank else 0.0),
        update_norm / max(before.norm().item(), 1e-300),
        (new_length_O - length_O).abs().mean().item(),
        (1.0 - cosine_O.clamp(max=1.0)).mean().item(),
    )


def find_intruders(before: Tensor, after: Tensor, top: int = 10, threshold: float = 0.5) -> Intruders:
    """Those of `after` (out, in). ValueError unless the settings are valid; their defaults are PEFT's, too."""
    if top < 1 or not 0.0 < threshold <= 1.0:
        raise ValueError(f"top is {top}, threshold {threshold}; valid: 1 or more, and above 0 up to 1")
    U_before, _, _ = svd(before)
    U, S, V = svd(after)
    top = min(top, int((S > 0).sum()))
    similarity = (U_before.t() @ U[:, :top]).abs().amax(0)
    found = (similarity < threshold).nonzero().flatten()
    U, S, V = U[:, found], S[found], V[:, found]
    base_share = (U.t() @ before.double()).norm(dim=1) / S
    figures = zip(found.tolist(), S.tolist(), similarity[found].tolist(), base_share.tolist(), strict=True)
    return Intruders(tuple(Intruder(*of_one) for of_one in figures), U * S, V.t())


def effective_rank(singular_values: Tensor) -> float:
    """exp(H(σ / Σ σ)): k for k equal ones; 0 if all are zero."""
    total = singular_values.sum()
    if total == 0:
        return 0.0
    shares = singular_values[singular_values > 0] / total
    return math.exp(-(shares * shares.log()).sum().item())


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, n), S (n,) descending, V (in, n), fp64: n the smaller side. Values of nothing, and their vectors, are
    zeros."""
    matrix = matrix.double()
    is_wide = matrix.shape[0] <= matrix.shape[1]
    wide = matrix if is_wide else matrix.t()
    squares, vectors = torch.linalg.eigh(wide @ wide.t())
    S, near = squares.flip(0).clamp(min=0.0).sqrt(), vectors.flip(1)
    rank = int((S > _SMALLEST * S[0]).sum())
    S[rank:], near[:, rank:] = 0.0, 0.0
    far = torch.zeros_like(wide.t())
    far[:, :rank] = wide.t() @ near[:, :rank] / S[:rank]
    return (near, S, far) if is_wide else (far, S, near)
