"""Causal attention over packed documents, and of new tokens against a cache. Nothing is padded.

H query heads share K key/value heads (query head h uses key head h // (H/K)); sliding windows throughout.

Training and prefill: on CUDA in half precision PyTorch's variable-length flash attention, elsewhere
minift/ops/attention.py. Decoding: one fused call for all sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from minift.model.cache import Append
from minift.model.cheap import CheapOps
from minift.model.config import ModelConfig
from minift.model.linear import Linear, project
from minift.model.norm import RMSNorm
from minift.ops.attention import causal_attention
from minift.ops.rope import apply_rope

# torch 2.12 made grouped queries an option one must ask for; 2.11 has no such option and simply handles them.
GROUPED_QUERIES = {"enable_gqa": True} if torch.__version__ >= (2, 12) else {}


@dataclass(frozen=True)
class Packing:
    """What every layer needs to know about a microbatch besides its hidden states; made once per forward."""

    cu_seqlens: Tensor  # (S+1,) int32: document s is tokens [cu_seqlens[s], cu_seqlens[s+1])
    max_seqlen: int
    cos_TR: Tensor
    sin_TR: Tensor
    append: Append | None = None  # with a cache: where the tokens go


class Attention(CheapOps):
    """Multi-head attention of one block; `layer` is its index, which says its window and its place in the cache."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.window = config.sliding_windows[layer]
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = Linear(query_size, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, hidden_TD: Tensor, packing: Packing) -> Tensor:
        heads = (len(hidden_TD), -1, self.head_dim)
        q, k, v = project(hidden_TD, self.q_proj, self.k_proj, self.v_proj)
        q_THE = self._rotated(q.view(heads), self.q_norm, packing)
        k_TKE = self._rotated(k.view(heads), self.k_norm, packing)
        v_TKE = v.view(heads)
        if packing.append is None:
            out_THE = packed_attention(q_THE, k_TKE, v_TKE, packing.cu_seqlens, packing.max_seqlen, self.window)
        else:
            out_THE = _cached_attention(q_THE, k_TKE, v_TKE, packing, packing.append, self.layer, self.window)
        return self.o_proj(out_THE.reshape(len(hidden_TD), -1))

    def _rotated(self, x_THE: Tensor, norm: RMSNorm | None, packing: Packing) -> Tensor:
        """Queries or keys, normed where the model says so, and turned by their position."""
        if norm is None:  # the rotation's backward needs no input, so attention may as well keep its result
            return apply_rope(x_THE, packing.cos_TR, packing.sin_TR)
        return self.cheap(lambda x_THE: apply_rope(norm(x_THE), packing.cos_TR, packing.sin_TR), x_THE)


def packed_attention(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int | None
) -> Tensor:
    """softmax(q kᵀ / √E) v inside each document, causal: (T, H, E) in q's dtype.

    With a window w, token i of a document sees tokens i-w+1 .. i. Extra memory is a block of scores, never T².
    """
    if q_THE.is_cuda and q_THE.dtype in (torch.bfloat16, torch.float16):
        lookback = -1 if window is None else window - 1
        # Here and not above: it imports torch's compiler, two seconds and 100 MiB that a CPU process has no use for.
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(
            q_THE, k_TKE, v_TKE, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
            window_size=(lookback, 0), **GROUPED_QUERIES,
        )  # fmt: skip
    return causal_attention(q_THE, k_TKE, v_TKE, cu_seqlens, cu_seqlens, window)


def _cached_attention(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, packing: Packing, append: Append, layer: int, window: int | None
) -> Tensor:
    """Attention of the new tokens (T) of each row to everything in their row. Inference only."""
    keys_BLKE, values_BLKE = append.write(layer, k_TKE, v_TKE)
    lengths = append.lengths
    if sum(lengths) == len(q_THE):  # the rows were empty: new tokens see only each other
        return packed_attention(q_THE, k_TKE, v_TKE, packing.cu_seqlens, packing.max_seqlen, window)
    if len(lengths) == len(q_THE):
        longest = max(lengths)
        return decode_attention(q_THE, keys_BLKE[:, :longest], values_BLKE[:, :longest], append.lengths_B, window)
    k = torch.cat([row[:length] for row, length in zip(keys_BLKE, lengths, strict=True)])
    v = torch.cat([row[:length] for row, length in zip(values_BLKE, lengths, strict=True)])
    kv_bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=k.device)
    return causal_attention(q_THE, k, v, packing.cu_seqlens, kv_bounds, window)


def decode_attention(
    q_BHE: Tensor, keys_BLKE: Tensor, values_BLKE: Tensor, lengths_B: Tensor, window: int | None
) -> Tensor:
    """One query per row against the first `lengths_B[b]` of L keys of its row, its own key being the last: (B, H, E).

    The H/K query heads of a key head are handed to the kernel as H/K *queries* of one head: the keys are read once and
    never repeated (4 to 10 times faster on CPU than `enable_gqa`).
    """
    slot_L = torch.arange(keys_BLKE.shape[1], device=q_BHE.device)
    visible_BL = slot_L < lengths_B.unsqueeze(1)
    if window is not None:
        visible_BL &= slot_L >= lengths_B.unsqueeze(1) - window
    k_BKLE, v_BKLE = keys_BLKE.transpose(1, 2), values_BLKE.transpose(1, 2)
    q_BKGE = q_BHE.unflatten(1, (k_BKLE.shape[1], -1))
    out_BKGE = F.scaled_dot_product_attention(q_BKGE, k_BKLE, v_BKLE, attn_mask=visible_BL[:, None, None])
    return out_BKGE.flatten(1, 2)
