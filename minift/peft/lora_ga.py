"""LoRA-GA: LoRA that starts where its first step goes as far along the gradient of W as a low rank can.

    G = dL/dW = U S Vᵀ        A₀ = c V[:, :r]ᵀ        B₀ = c U[:, r:2r]        c = out^¼ / √gamma

The first step of gradient descent on A and B changes the weight by a multiple of

    G A₀ᵀ A₀ + B₀ B₀ᵀ G = c² (U[:, :r] S V[:, :r]ᵀ + U[:, r:2r] S V[:, r:2r]ᵀ)

which is the best approximation of G that rank 2r allows. (LoRA's, with B = 0 and A random, is G seen through r random
directions.) c keeps the size of the output independent of `out`.

Paper: Wang, Yu, Li 2024, arXiv 2407.05000, theorem 3.1 and algorithm 1. PEFT has the same vectors (its "ArB2r"), but
multiplies B₀ by the singular values as well and A₀ by no c, so that the two parts have unequal weight; this is the
paper's. G is the average over `gradient_steps`; how it is taken apart without being held: `minift/start/gradients.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from minift.peft.residual import ResidualLoraConfig, Spectrum


@dataclass(frozen=True, kw_only=True)
class LoraGaConfig(ResidualLoraConfig):
    """Settings of LoRA-GA.

    gamma: the larger, the smaller the initial values; 16 in most of the paper, 64 for a model of 7 billion weights.
    """

    method: Literal["lora_ga"] = "lora_ga"
    gamma: float = 16.0
    source = "gradients"
    directions_per_rank = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.gamma) and self.gamma > 0):
            raise ValueError(f"gamma is {self.gamma!r}; valid: a finite number > 0")

    def factors(self, name: str, spectrum: Spectrum) -> tuple[Tensor, Tensor]:
        rank, size = self.rank(name), len(spectrum.U) ** 0.25 / math.sqrt(self.gamma)
        return size * spectrum.V[:, :rank].T, size * spectrum.U[:, rank : 2 * rank]
