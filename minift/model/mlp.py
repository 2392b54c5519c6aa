"""The gated feed-forward of a block: down(silu(gate(x)) · up(x)). Shazeer 2020, arXiv 2002.05202, eq. 6."""

from __future__ import annotations

from torch import Tensor

from minift.model.cheap import CheapOps
from minift.model.config import ModelConfig
from minift.model.linear import Linear
from minift.model.project import project, project_gated, project_to_gate
from minift.ops.swiglu import swiglu


class MLP(CheapOps):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_TD: Tensor, result_is_read: bool = True) -> Tensor:
        """(T, D) -> (T, D); result_is_read: see `project_gated`."""
        if self.down_proj.parts() is None:
            gate_TF, up_TF = project(hidden_TD, self.gate_proj, self.up_proj)
            return self.down_proj(self.cheap(swiglu, gate_TF, up_TF))
        gate_TF, up_TF, pending = project_to_gate(hidden_TD, self.gate_proj, self.up_proj)
        return project_gated(gate_TF, up_TF, self.down_proj, self.keeps_cheap, result_is_read, pending)
