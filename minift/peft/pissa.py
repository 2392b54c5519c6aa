"""PiSSA: LoRA that starts at the principal singular vectors of the weight, so that these are what is trained.

    W = U S Vᵀ        B₀ = U_r √(S_r / s)        A₀ = √(S_r / s) V_rᵀ        s B₀ A₀ = the best rank-r part of W

Paper: Meng, Wang, Zhang 2024, arXiv 2404.02948, eqs. 2 to 4. Values are PEFT's (`init_lora_weights="pissa"`).

In 4 bits (the paper's QPiSSA) it is the residual that is quantised. nf4(W - s B₀ A₀) + s B₀ A₀ is nearer to W than
nf4(W): its largest directions are not rounded, and what is left is smaller. That needs the weights from before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from minift.peft.residual import ResidualLoraConfig, Spectrum


@dataclass(frozen=True, kw_only=True)
class PissaConfig(ResidualLoraConfig):
    """Settings of PiSSA: those of LoRA."""

    method: Literal["pissa"] = "pissa"
    source = "weights"
    quantizes_residual = True

    def factors(self, name: str, spectrum: Spectrum) -> tuple[Tensor, Tensor]:
        rank = self.rank(name)
        roots_R = (spectrum.S[:rank] / self.scale(name)).sqrt()
        return roots_R.unsqueeze(1) * spectrum.V[:, :rank].T, spectrum.U[:, :rank] * roots_R
