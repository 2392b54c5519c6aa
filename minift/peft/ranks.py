"""Which projection gets how much rank, under a budget of parameters.

A rank r costs a projection r (in + out) parameters and is worth the sum of its r largest gains. With every projection
at least at rank 1, the ranks of the largest total worth that fit the budget are found exactly: a knapsack, filled one
projection after the other, in steps of the largest number of parameters that divides every cost.

    "weights"      gain of the i-th rank = σ_i² / Σ σ²    of the weight: the share of it that rank i describes
    "gradients"    gain of the i-th rank = σ_i²           of the gradient: by how much one more direction lets the loss
                                                          fall in a first step of given size (comparable between
                                                          projections, as the loss is the same)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np


def allocate_ranks(gains: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """Rank of each projection, 1 to len(gains[name]), that makes the sum of gains largest with a sum of rank · cost of
    at most `budget`.

    gains: of its first, second, ... rank, each at least 0 and none larger than the one before. ValueError if the budget
    is too small for rank 1 everywhere.
    """
    least = sum(costs[name] for name in gains)
    if budget < least:
        raise ValueError(f"{budget} parameters are too few for rank 1 in {len(gains)} projections; valid: >= {least}")
    unit = math.gcd(*(costs[name] for name in gains))
    room = (budget - least) // unit  # beyond rank 1
    best = np.zeros(room + 1)  # worth of the projections so far, by the room that they may take
    chosen: list[np.ndarray] = []
    for name, of_one in gains.items():
        size, worth = costs[name] // unit, np.cumsum(np.asarray(of_one, dtype=np.float64)[1:])
        new, extra = best.copy(), np.zeros(room + 1, dtype=np.int32)
        for more, value in enumerate(worth[: room // size], start=1):
            start = more * size
            better = best[: room + 1 - start] + value
            wins = better > new[start:]
            new[start:][wins] = better[wins]
            extra[start:][wins] = more
        best = new
        chosen.append(extra)
    ranks = {}
    for name, extra in zip(reversed(gains), reversed(chosen), strict=True):
        ranks[name] = 1 + int(extra[room])
        room -= int(extra[room]) * (costs[name] // unit)
    return {name: ranks[name] for name in gains}
