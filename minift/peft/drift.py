"""Into what an adapter is merged, and how far the merged weights are from the model that was trained.

The model that was trained computes with W + ΔW, where W is the base weight as its layer holds it: what 4 bits say, if
the base was quantized. A merge has to write this sum down somewhere, and there are three places:

    dequantized    W + ΔW, dense: the model that was trained, up to one rounding to the dense format
    original       W₀ + ΔW, dense, with W₀ the full-precision weight from which W was quantized: often better than the
                   trained model, but another one; the distance is the quantization error W₀ - W
    requantized    W + ΔW rounded to the base's own format: as small as before, and most of a small ΔW is lost

Over a dense base the three are one. The drift of a merged weight W' is measured against the sum before any rounding:

    error = W' - (W + ΔW)              lost_ratio = ‖error‖ / ‖ΔW‖  (Frobenius)

0.01 means that 1 % of the update was replaced by noise; above 1 it drowned. It says nothing about logits; for those,
run both models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

MergeTarget = Literal["dequantized", "original", "requantized"]


def check_target(target: str) -> None:
    """ValueError unless `target` is a `MergeTarget`."""
    if target not in get_args(MergeTarget):
        raise ValueError(f"the merge target is {target!r}; valid: {', '.join(get_args(MergeTarget))}")


@dataclass(frozen=True)
class WeightDrift:
    """How far one merged weight is from the trained sum. Norms are Frobenius norms, errors absolute values."""

    name: str
    update_norm: float
    error_norm: float
    mean_error: float
    max_error: float

    @property
    def lost_ratio(self) -> float:
        """The error in units of the update; 0 if there is none, even from an update of zero."""
        if self.error_norm == 0.0:
            return 0.0
        return self.error_norm / self.update_norm if self.update_norm > 0.0 else float("inf")


def measure_drift(name: str, merged: Tensor, exact: Tensor, base: Tensor) -> WeightDrift:
    """Of `merged` against `exact`, the unrounded sum of `base` and its update. Any dtypes; the differences are formed
    in fp32 (exact enough: both sides are close), sums in fp64."""
    error = (merged.float() - exact.float()).abs_()
    return WeightDrift(
        name,
        update_norm=_norm(exact.float() - base.float()),
        error_norm=_norm(error),
        mean_error=error.mean(dtype=torch.float64).item(),
        max_error=error.max().item(),
    )


@dataclass(frozen=True)
class MergeReport:
    """One `WeightDrift` per merged weight, in the order of the model."""

    target: MergeTarget
    drifts: tuple[WeightDrift, ...]

    @property
    def lost_ratio(self) -> float:
        """That of all weights together, as if they were one."""
        norms = [[drift.error_norm for drift in self.drifts], [drift.update_norm for drift in self.drifts]]
        error_norm, update_norm = (math.hypot(*of_each) for of_each in norms)
        return WeightDrift("", update_norm, error_norm, 0.0, 0.0).lost_ratio

    def __str__(self) -> str:
        """The sum of it, in one line."""
        worst = max(self.drifts, key=lambda drift: drift.lost_ratio)
        return (
            f"merged {len(self.drifts)} weights ({self.target}); error / update: overall {self.lost_ratio:.2%}, "
            f"largest {worst.lost_ratio:.2%} ({worst.name})"
        )

    def worst(self) -> list[WeightDrift]:
        """Of each projection of a block (q_proj, ...), wherever it occurs, the weight that lost most."""
        worst: dict[str, WeightDrift] = {}
        for drift in self.drifts:
            projection = drift.name.removesuffix(".weight").rpartition(".")[2]
            if projection not in worst or drift.lost_ratio > worst[projection].lost_ratio:
                worst[projection] = drift
        return list(worst.values())

    def table(self) -> str:
        """A line for each of `worst`."""
        rows = self.worst()
        width = max(len("worst of each projection"), *(len(drift.name) for drift in rows))
        lines = [f"{'worst of each projection':{width}}  |update|   |error|  error/update  mean error   max error"]
        lines += [
            f"{d.name:{width}}  {d.update_norm:8.2e}  {d.error_norm:8.2e}  {d.lost_ratio:12.2%}  "
            f"{d.mean_error:10.2e}  {d.max_error:10.2e}"
            for d in rows
        ]
        return "\n".join(lines)


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()
