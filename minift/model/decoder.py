"""The causal language model: embedding, blocks, norm, head. Parameter names are Hugging Face's.

    model = CausalLM(config)                 # real, or under torch.device("meta")
    logits_TV = model(tokens_T, positions_T, cu_seqlens, max_seqlen, head=lambda hidden_TD, lm_head: lm_head(hidden_TD))

What becomes of the final hidden states is the caller's `head`: logits, a loss that never holds all logits, the last
position only. It runs inside forward because that is when FSDP has the root's parameters, the LM head's among them.

Knows nothing of ranks, precision policies, adapters or losses. Holds no buffers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minift.model.attention import Packing
from minift.model.block import Block
from minift.model.cache import KVCache
from minift.model.config import ModelConfig
from minift.model.embedding import Embedding
from minift.model.linear import Linear
from minift.model.norm import RMSNorm
from minift.model.rope import rotary_tables


class Decoder(nn.Module):
    """Everything below the head. A module of its own only because Hugging Face's names say `model.`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens_T: Tensor, packing: Packing) -> Tensor:
        hidden_TD = self.embed_tokens(tokens_T)
        for layer in self.layers:
            hidden_TD = layer(hidden_TD, packing)
        return self.norm(hidden_TD)


class CausalLM(nn.Module):
    """A decoder-only language model with uninitialised weights: load them (hf.py) or call `init_weights`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's Parameter if the config says so. Call again after replacing either."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def shard_units(self) -> list[nn.Module]:
        """Modules worth gathering and freeing as one each; what is in none of them belongs to the root."""
        return list(self.model.layers)

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        head: Callable[[Tensor, nn.Module], Any],
        cache: KVCache | None = None,
    ) -> Any:
        """Run packed documents and return `head(hidden_TD, self.lm_head)`.

        tokens_T int64; positions_T int64, from 0 in each document; cu_seqlens (S+1,) int32, document s is tokens
        [cu_seqlens[s], cu_seqlens[s+1]), none of them empty; max_seqlen: the longest document in tokens. With a cache,
        documents continue its rows (see cache.py).
        """
        cos_TR, sin_TR = rotary_tables(self.config.rope, self.config.head_dim, positions_T, cu_seqlens)
        append = None if cache is None else cache.plan(cu_seqlens)
        hidden_TD = self.model(tokens_T, Packing(cu_seqlens, max_seqlen, cos_TR, sin_TR, append))
        if append is not None:
            append.commit()
        return head(hidden_TD, self.lm_head)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Random weights as transformers draws them: matrices normal with `initializer_range`, norms 1, biases 0.

        Each is a pure function of seed, parameter name and shape: neither order nor the number of ranks matters.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
                values = torch.randn(parameter.shape, generator=generator) * self.config.initializer_range
                parameter.copy_(values)
