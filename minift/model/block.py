"""One pre-norm transformer block: attention and MLP, each behind a norm and added to the residual stream.

A block is the unit of sharding and of recomputation, so its forward takes one tensor that needs a gradient, first, and
everything else in one `Packing`.
"""

from __future__ import annotations

from torch import Tensor, nn

from minift.model.attention import Attention, Packing
from minift.model.cheap import CheapOps
from minift.model.config import ModelConfig
from minift.model.mlp import MLP
from minift.model.norm import RMSNorm


class Block(CheapOps):
    result_is_read = True
    """False: a forward is run for the sake of its graph. The result's values are then left out, and with them the last
    matrix product, a quarter of a block's work."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, hidden_TD: Tensor, packing: Packing) -> Tensor:
        hidden_TD = self._plus(self.self_attn, self.input_layernorm, hidden_TD, packing)
        return self._plus(self.mlp, self.post_attention_layernorm, hidden_TD, self.result_is_read)

    def _plus(self, branch: nn.Module, norm: RMSNorm, hidden_TD: Tensor, *others: object) -> Tensor:
        """hidden + branch(norm(hidden), *others)."""
        normed_TD, hidden_TD = self.cheap(norm.with_residual, hidden_TD)
        return hidden_TD + branch(normed_TD, *others)
