"""Causal attention over packed documents, and of new tokens against a cache. Nothing is padded.

H query heads share K key/value heads (query head h uses key head h // (H/K)); sliding windows throughout.

Documents may begin with the same virtual tokens (see `decoder`). Causal attention makes them independent of what comes
after, so a pack holds them once, in front of all documents, and each document attends to them as to its own beginning.

Training and prefill: on CUDA in half precision cuDNN where its frontend is installed, the GPU is a Hopper or later one,
documents have 512 tokens and more, share none, and no window cuts them; else PyTorch's variable-length flash attention;
elsewhere minift/ops/attention.py. Decoding: one fused call for all sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from minift.model.cache import Append
from minift.model.cheap import CheapOps
from minift.model.config import ModelConfig
from minift.model.linear import Linear
from minift.model.norm import RMSNorm
from minift.model.project import project
from minift.ops.attention import causal_attention
from minift.ops.cudnn_attention import Documents, cudnn_attention, is_best_for
from minift.ops.rope import apply_rope

# torch 2.12 made grouped queries an option one must ask for; 2.11 has no such option and simply handles them.
GROUPED_QUERIES = {"enable_gqa": True} if torch.__version__ >= (2, 12) else {}
FLASH_HEAD_DIM_UNIT = 8


@dataclass(frozen=True)
class Packing:
    """What every layer needs to know about a microbatch besides its hidden states; made once per forward."""

    cu_seqlens: Tensor  # (S+1,) int32: document s is tokens [cu_seqlens[s], cu_seqlens[s+1])
    max_seqlen: int
    cos_TR: Tensor
    sin_TR: Tensor
    append: Append | None = None  # with a cache: where the tokens go
    num_shared: int = 0  # tokens before cu_seqlens[0]: the beginning of every document

    @cached_property
    def documents(self) -> Documents:
        """The same for cuDNN."""
        return Documents.of(self.cu_seqlens, self.max_seqlen, len(self.cos_TR))


class Attention(CheapOps):
    """Multi-head attention of one block; `layer` is its index, which says its window and its place in the cache."""

    num_virtual_tokens = 0
    """Length of `prefix`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.window = config.sliding_windows[layer]
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = Linear(query_size, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def prefix(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values (P, K, E), not rotated, of the virtual tokens that documents begin with in this block."""
        return None

    def forward(self, hidden_TD: Tensor, packing: Packing, prefix: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(T, D) -> (T, D). prefix: what `prefix` says, any float dtype; not with a cache, whose rows begin with it."""
        heads = (len(hidden_TD), -1, self.head_dim)
        q, k, v = project(hidden_TD, self.q_proj, self.k_proj, self.v_proj)
        q_THE = self._rotated(q.view(heads), self.q_norm, packing)
        k_TKE = self._rotated(k.view(heads), self.k_norm, packing)
        v_TKE = v.view(heads)
        if packing.append is None:
            if prefix is not None:
                k_TKE, v_TKE = (torch.cat([of.to(x.dtype), x]) for of, x in zip(prefix, (k_TKE, v_TKE), strict=True))
            out_THE = packed_attention(q_THE, k_TKE, v_TKE, packing, self.window)
        else:
            assert prefix is None
            out_THE = _cached_attention(q_THE, k_TKE, v_TKE, packing, packing.append, self.layer, self.window)
        return self.o_proj(out_THE.reshape(len(hidden_TD), -1))

    def _rotated(self, x_THE: Tensor, norm: RMSNorm | None, packing: Packing) -> Tensor:
        """Queries or keys, normed where the model says so, and turned by their position."""
        if norm is None:  # the rotation's backward needs no input, so attention may as well keep its result
            return apply_rope(x_THE, packing.cos_TR, packing.sin_TR)
        return self.cheap(lambda x_THE: apply_rope(norm(x_THE), packing.cos_TR, packing.sin_TR), x_THE)


def packed_attention(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, packing: Packing, window: int | None) -> Tensor:
    """softmax(q kᵀ / √E) v inside each document, causal: (T, H, E) in q's dtype.

    k and v may have more rows than q: those of a prefix, in front. A document begins with the prefix, then the shared
    tokens. With a window w, token i of it sees tokens i-w+1 .. i. Extra memory is a block of scores, never T².
    """
    q_bounds, num_prefix = packing.cu_seqlens, len(k_TKE) - len(q_THE)
    kv_bounds = q_bounds + num_prefix if num_prefix else q_bounds
    longest, num_shared_keys = max(packing.max_seqlen, packing.num_shared), packing.num_shared + num_prefix
    if window is not None and window >= longest + num_shared_keys:
        window = None
    if window is None and not num_shared_keys and is_best_for(q_THE, longest):
        return cudnn_attention(q_THE, k_TKE, v_TKE, packing.documents)
    is_half = q_THE.dtype in (torch.bfloat16, torch.float16)
    if q_THE.is_cuda and is_half and q_THE.shape[2] % FLASH_HEAD_DIM_UNIT == 0:
        if num_shared_keys:
            rows, q_bounds, kv_bounds = copies_of_shared(
                q_bounds, kv_bounds, packing.num_shared, num_shared_keys, len(k_TKE)
            )
            k_TKE, v_TKE = k_TKE.index_select(0, rows), v_TKE.index_select(0, rows)
        # Here and not above: it imports torch's compiler, two seconds and 100 MiB that a CPU process has no use for.
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(
            q_THE, k_TKE, v_TKE, q_bounds, kv_bounds, longest, longest + num_shared_keys,
            window_size=(-1 if window is None else window - 1, 0), **GROUPED_QUERIES,
        )  # fmt: skip
    return causal_attention(q_THE, k_TKE, v_TKE, q_bounds, kv_bounds, window)


def copies_of_shared(
    q_bounds: Tensor, kv_bounds: Tensor, num_queries: int, num_keys: int, total_keys: int
) -> tuple[Tensor, Tensor, Tensor]:
    """For a kernel that knows no shared keys: which rows of k and v to copy so that every document has its own, and the
    bounds of documents then.

    num_queries, num_keys: q_bounds[0] and kv_bounds[0], known on the host, which waits for nothing here; total_keys:
    kv_bounds[-1]. Shared tokens with queries become one more document.
    """
    if num_queries:
        q_bounds, kv_bounds = F.pad(q_bounds, (1, 0)), torch.cat([kv_bounds[:1], kv_bounds])
    num_documents = len(kv_bounds) - 1
    lengths_S = kv_bounds.diff() + num_keys
    bounds = F.pad(lengths_S.cumsum(0), (1, 0))
    num_rows = total_keys + (num_documents - 1) * num_keys
    document_N = torch.arange(num_documents, device=bounds.device).repeat_interleave(lengths_S, output_size=num_rows)
    key_N = torch.arange(num_rows, device=bounds.device) - bounds[document_N]
    rows_N = torch.where(key_N < num_keys, key_N, key_N - num_keys + kv_bounds[document_N])
    return rows_N, q_bounds, bounds.to(torch.int32)


def _cached_attention(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, packing: Packing, append: Append, layer: int, window: int | None
) -> Tensor:
    """Attention of the new tokens (T) of each row to everything in their row. Inference only."""
    keys_BLKE, values_BLKE = append.write(layer, k_TKE, v_TKE)
    lengths = append.lengths
    if sum(lengths) == len(q_THE):  # the rows were empty: new tokens see only each other
        return packed_attention(q_THE, k_TKE, v_TKE, packing, window)
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
