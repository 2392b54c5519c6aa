"""Rows of the test matrix for methods that put virtual tokens before documents.

Their formulas take one document at a time, with a copy of its own of what stands before it: what the model shares
among documents, the positions that follow and the gradients' sum over documents are all spelled out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from minift.model.attention import Attention, Packing
from minift.model.decoder import CausalLM
from tests.peft.rows import Row


class PrefixRow(Row):
    """`own`: the local names of what is trained in each block."""

    def trainable(self, model: CausalLM) -> list[str]:
        blocks = range(len(model.model.layers))
        shared = [f"model.layers.0.self_attn.{local_name}" for local_name in self.own.get("encoder", ())]
        return shared + [f"model.layers.{block}.self_attn.{local}" for block in blocks for local in self.own["block"]]

    def as_formulas(self, model: CausalLM, own: dict[str, Tensor]) -> None:
        theta = model.config.rope.theta
        for index, layer in enumerate(model.model.layers):
            if "encoder" in self.own:
                prefix = partial(projected_prefix, own, index, layer.self_attn)
            else:
                prefix = partial(plain_prefix, own, index)
            layer.self_attn = _DocumentByDocument(layer.self_attn, prefix, theta)


def plain_prefix(own: dict[str, Tensor], index: int) -> list[Tensor]:
    return [own[f"model.layers.{index}.self_attn.prefix_{kind}"] for kind in ("keys", "values")]


def projected_prefix(own: dict[str, Tensor], index: int, attention: Attention) -> list[Tensor]:
    """W_l tanh(W e + b) + b_l, keys first, of block `index`."""
    encoder, block = "model.layers.0.self_attn.encoder", f"model.layers.{index}.self_attn.prefix_proj"
    hidden = own[f"{encoder}.embedding.weight"] @ own[f"{encoder}.hidden_proj.weight"].T
    hidden = torch.tanh(hidden + own[f"{encoder}.hidden_proj.bias"])
    both = hidden @ own[f"{block}.weight"].T + own[f"{block}.bias"]
    return [half.unflatten(1, (attention.num_kv_heads, attention.head_dim)) for half in both.chunk(2, dim=1)]


class _DocumentByDocument(nn.Module):
    """Attention with a T x T mask, and the prefix in front of the keys and values of each document."""

    num_virtual_tokens = 0  # the model is to turn nothing: it is done here

    def __init__(self, attention: Attention, prefix: Callable[[], list[Tensor]], theta: float) -> None:
        super().__init__()
        self.attention, self.prefix, self.theta = attention, prefix, theta

    def forward(self, hidden_TD: Tensor, packing: Packing) -> Tensor:
        bounds = packing.cu_seqlens.tolist()
        return torch.cat([self.document(hidden_TD[start:stop]) for start, stop in pairwise(bounds)])

    def document(self, hidden_TD: Tensor) -> Tensor:
        attention, (prefix_k, prefix_v) = self.attention, self.prefix()
        num_tokens, num_virtual = len(hidden_TD), len(prefix_k)
        q, k, v = (
            projection(hidden_TD).unflatten(1, (-1, attention.head_dim))
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        positions = num_virtual + torch.arange(num_tokens)
        k, v = torch.cat([prefix_k, self.turned(k, positions)]), torch.cat([prefix_v, v])
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhe,khe->hqk", self.turned(q, positions), k) / attention.head_dim**0.5
        hidden = torch.ones(num_tokens, num_virtual + num_tokens).triu(num_virtual + 1).bool()
        out = torch.einsum("hqk,khe->qhe", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        return attention.o_proj(out.flatten(1))

    def turned(self, x_THE: Tensor, positions: Tensor) -> Tensor:
        """Each pair (i, i + E/2) by position · theta^(-2i/E)."""
        half = x_THE.shape[-1] // 2
        angle = positions.double().unsqueeze(1) * self.theta ** (-torch.arange(half).double() / half)
        turn = torch.polar(torch.ones_like(angle), angle).unsqueeze(1)
        turned = torch.complex(*x_THE.split(half, dim=-1)) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)


class PromptRow(Row):
    """Each document is run with the prompt's embeddings in front, and their hidden states are left out."""

    def trainable(self, model: CausalLM) -> list[str]:
        return ["model.embed_tokens.prompt_embeddings"]

    def as_formulas(self, model: CausalLM, own: dict[str, Tensor]) -> None:
        (prompt,) = own.values()
        plain = model.forward

        def forward(tokens_T: Tensor, positions_T: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, head) -> Tensor:
            documents = tokens_T.split(cu_seqlens.diff().tolist())
            hidden = [self.document(model, plain, prompt, document) for document in documents]
            return head(torch.cat(hidden), model.lm_head)

        model.forward = forward

    def document(self, model: CausalLM, plain, prompt: Tensor, tokens_T: Tensor) -> Tensor:
        """Hidden states of its tokens. The model gets rows instead of tokens: those of a stand-in for the embedding."""
        embedding = model.model.embed_tokens
        rows = torch.cat([prompt, embedding(tokens_T)])
        model.model.embed_tokens = _Rows(rows)
        length = len(rows)
        hidden_TD = plain(
            torch.zeros(length, dtype=torch.int64), torch.arange(length), torch.tensor([0, length], dtype=torch.int32),
            length, head=lambda hidden_TD, lm_head: hidden_TD,
        )  # fmt: skip
        model.model.embed_tokens = embedding
        return hidden_TD[len(prompt) :]


class _Rows(nn.Module):
    num_virtual_tokens = 0

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, tokens_T: Tensor) -> Tensor:
        return self.rows
