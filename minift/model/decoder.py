"""The causal language model: embedding, blocks, norm, head. Parameter names are Hugging Face's.

    model = CausalLM(config)                 # real, or under torch.device("meta")
    logits_TV = model(tokens_T, positions_T, cu_seqlens, max_seqlen, head=lambda hidden_TD, lm_head: lm_head(hidden_TD))

What becomes of the final hidden states is the caller's `head`: logits, a loss that never holds all logits, the last
position only. It runs inside forward because that is when FSDP has the root's parameters, the LM head's among them.

[Note: virtual tokens] Adapters may let every document begin with the same P tokens that no batch contains. They are
rows which the embedding puts before those of a pack (prompt tuning), or keys and values of each block (prefix tuning).
Tokens of batches then have positions from P on, and the head does not see the virtual ones. A pack has them once and
not once per document (see `attention`), a cache has them at the beginning of each row.

Knows nothing of ranks, precision policies, adapters or losses. Holds no buffers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
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

    def forward(self, hidden_TD: Tensor, packing: Packing) -> Tensor:
        """Embeddings to the hidden states that the head reads."""
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

    @property
    def num_virtual_tokens(self) -> int:
        """P of [Note: virtual tokens]."""
        return self.model.embed_tokens.num_virtual_tokens + self.model.layers[0].self_attn.num_virtual_tokens

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
        hidden_TD = self.model.embed_tokens(tokens_T)
        num_virtual, num_shared = self.num_virtual_tokens, self.model.embed_tokens.num_virtual_tokens
        if cache is not None:  # it has them already
            hidden_TD, num_shared = hidden_TD[num_shared:], 0  # no gradients here, so this costs nothing
        elif num_virtual:
            embedded_P = torch.arange(num_virtual - num_shared, num_virtual, device=positions_T.device)
            positions_T = torch.cat([embedded_P, positions_T + num_virtual])
            cu_seqlens = cu_seqlens + num_shared
        packing = self._packing(positions_T, cu_seqlens, max_seqlen, num_shared, cache)
        hidden_TD = self.model(hidden_TD, packing)
        if packing.append is not None:
            packing.append.commit()
        return head(hidden_TD[num_shared:] if num_shared else hidden_TD, self.lm_head)

    def _packing(
        self, positions_T: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_shared: int, cache: KVCache | None
    ) -> Packing:
        """Of rows of which the first `num_shared` are virtual tokens, in `positions_T` and before `cu_seqlens[0]`."""
        append = None if cache is None else cache.plan(cu_seqlens)
        bounds = F.pad(cu_seqlens, (1, 0)) if num_shared else cu_seqlens
        tables = rotary_tables(self.config.rope, self.config.head_dim, positions_T, bounds)
        return Packing(cu_seqlens, max_seqlen, *tables, append, num_shared)

    @torch.no_grad()
    def new_cache(self, batch_size: int, max_tokens: int) -> KVCache:
        """Rows for `batch_size` sequences of at most `max_tokens` tokens each, which begin with the virtual tokens.

        Takes 2 · num_layers · batch_size · (P + max_tokens) · num_kv_heads · head_dim elements. For a model that one
        process holds whole.
        """
        embed_tokens, num_virtual = self.model.embed_tokens, self.num_virtual_tokens
        dtype, device = self.model.norm.weight.dtype, self.model.norm.weight.device  # a norm is never wrapped or packed
        cache = KVCache.allocate(self.config, batch_size, num_virtual + max_tokens, dtype, device)
        if num_virtual:
            row = KVCache.allocate(self.config, 1, num_virtual, dtype, device)
            row.begin([layer.self_attn.prefix() for layer in self.model.layers])
            if num_embedded := embed_tokens.num_virtual_tokens:
                hidden_PD = embed_tokens(torch.empty(0, dtype=torch.int64, device=device))
                positions_P = torch.arange(num_virtual - num_embedded, num_virtual, device=device)
                bounds = torch.tensor([0, num_embedded], dtype=torch.int32, device=device)
                packing = self._packing(positions_P, bounds, num_embedded, 0, row)
                self.model(hidden_PD, packing)
                packing.append.commit()
            cache.begin(row.first())
        return cache

    @torch.no_grad()
    def keys_and_values(self, tokens_T: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of each block those of one document without virtual tokens, as attention sees them: (T, K, E) both."""
        weight, count = self.model.norm.weight, len(tokens_T)
        row = KVCache.allocate(self.config, 1, count, weight.dtype, weight.device)
        positions_T = torch.arange(count, device=weight.device)
        bounds = torch.tensor([0, count], dtype=torch.int32, device=weight.device)
        self(tokens_T.to(weight.device), positions_T, bounds, count, head=lambda hidden_TD, lm_head: None, cache=row)
        return row.first()

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
