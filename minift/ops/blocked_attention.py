"""Causal attention over packed documents in plain PyTorch: a block of query rows at a time, on any device.

The reference of minift/ops/attention.py, and what runs where that has no compiled kernel. A block is compared with all
the keys it may see, so its softmax is the plain one; nothing of the size T² ever exists. What lies above the diagonal
blocks or outside a sliding window is never computed. Everything inside is fp32 (float64 for float64 input) in the
layout (K, T·G, E), G = H/K: the G query heads that share a key head lie next to each other as rows, so one matrix
product serves them all. A block that sees keys which all documents share has them copied in front of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# A block of scores has about this many elements (2 MiB of fp32: it stays in a core's cache) and this many query rows.
SCORES_PER_BLOCK = 2**19
MIN_QUERIES_PER_BLOCK, MAX_QUERIES_PER_BLOCK = 32, 96


def blocked_attention(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, q_bounds: Tensor, kv_bounds: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    """out (T, H, E) in q's dtype, and the log-sum-exp of each query's scores (T, H) in the dtype of the arithmetic."""
    kv_heads, group = k_TKE.shape[1], q_THE.shape[1] // k_TKE.shape[1]
    q, k, v = _by_kv_head(q_THE, kv_heads), _by_kv_head(k_TKE, kv_heads), _by_kv_head(v_TKE, kv_heads)
    q *= q_THE.shape[-1] ** -0.5
    out_THE = torch.empty(q_THE.shape, dtype=q_THE.dtype, device=q_THE.device)
    lse_TH = torch.empty(q_THE.shape[:2], dtype=q.dtype, device=q_THE.device)
    for block in _blocks(q_bounds.tolist(), kv_bounds.tolist(), window, heads=q_THE.shape[1]):
        rows = slice(block.start * group, block.stop * group)
        scores = _visible_scores(q[:, rows], block.seen(k), block, group)
        probabilities = torch.softmax(scores, dim=-1)
        _put_by_head(out_THE[block.start : block.stop], torch.bmm(probabilities, block.seen(v)))
        # The largest probability is e^(largest score - lse), and never so small that its logarithm is not exact.
        lse = scores.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log_()
        _put_by_head(lse_TH[block.start : block.stop].unsqueeze(-1), lse)
    return out_THE, lse_TH


def blocked_attention_backward(
    dout_THE: Tensor, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, out_THE: Tensor, lse_TH: Tensor,
    q_bounds: Tensor, kv_bounds: Tensor, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq (T, H, E), dk and dv (T', K, E) in the dtype of q, from what `blocked_attention` was given and returned."""
    kv_heads, scale = k_TKE.shape[1], q_THE.shape[-1] ** -0.5
    group = q_THE.shape[1] // kv_heads
    q, k, v = _by_kv_head(q_THE, kv_heads), _by_kv_head(k_TKE, kv_heads), _by_kv_head(v_TKE, kv_heads)
    q *= scale
    dout, lse = _by_kv_head(dout_THE, kv_heads), _by_kv_head(lse_TH.unsqueeze(-1), kv_heads)
    delta = (_by_kv_head(out_THE, kv_heads) * dout).sum(-1, keepdim=True)
    dq_THE = torch.empty(q_THE.shape, dtype=q_THE.dtype, device=q_THE.device)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for block in _blocks(q_bounds.tolist(), kv_bounds.tolist(), window, heads=q_THE.shape[1]):
        rows, seen_k = slice(block.start * group, block.stop * group), block.seen(k)
        probabilities = _visible_scores(q[:, rows], seen_k, block, group).sub_(lse[:, rows]).exp_()
        block.add_product_(dv, probabilities.transpose(1, 2), dout[:, rows])
        dscores = torch.bmm(dout[:, rows], block.seen(v).transpose(1, 2)).sub_(delta[:, rows]).mul_(probabilities)
        _put_by_head(dq_THE[block.start : block.stop], torch.bmm(dscores, seen_k).mul_(scale))
        block.add_product_(dk, dscores.transpose(1, 2), q[:, rows])
    dk_TKE, dv_TKE = (torch.empty(k_TKE.shape, dtype=k_TKE.dtype, device=k_TKE.device) for _ in "kv")
    _put_by_head(dk_TKE, dk)
    _put_by_head(dv_TKE, dv)
    return dq_THE, dk_TKE, dv_TKE


@dataclass(frozen=True)
class _Block:
    """Query tokens [start, stop) of the pack and the keys that at least one of them sees: the rows in `keys`, in order.

    The last query sees the last key. `window` is None where it hides none of these keys from any of these queries.
    """

    start: int
    stop: int
    keys: tuple[slice, ...]
    window: int | None

    @property
    def num_keys(self) -> int:
        return sum(rows.stop - rows.start for rows in self.keys)

    def seen(self, x: Tensor) -> Tensor:
        """Rows `keys` of keys or values x (K, T', E); a copy if they are not adjacent."""
        if len(self.keys) == 1:
            return x[:, self.keys[0]]
        return torch.cat([x[:, rows] for rows in self.keys], dim=1)

    def add_product_(self, x: Tensor, a: Tensor, b: Tensor) -> None:
        """Add a b, (K, num_keys, E), to these rows of x."""
        parts = a.split([rows.stop - rows.start for rows in self.keys], dim=1)
        for rows, part in zip(self.keys, parts, strict=True):
            x[:, rows].baddbmm_(part, b)


def _blocks(q_bounds: list[int], kv_bounds: list[int], window: int | None, heads: int) -> Iterator[_Block]:
    shared = kv_bounds[0]
    # The queries of the shared keys, if there are any, are those of one more document, which has no keys of its own.
    documents = zip([0, *q_bounds], q_bounds, [shared, *kv_bounds], kv_bounds, strict=False)
    for first, last, own, kv_last in documents:
        if first == last:
            continue
        kv_first = own - shared  # shared keys are numbered as if they stood right before the document's own
        shift = kv_last - last  # query t is key t + shift
        most_keys = kv_last - kv_first if window is None else min(kv_last - kv_first, window + MAX_QUERIES_PER_BLOCK)
        wanted = SCORES_PER_BLOCK // (heads * most_keys)
        queries = max(MIN_QUERIES_PER_BLOCK, min(MAX_QUERIES_PER_BLOCK, wanted))
        num_blocks = math.ceil((last - first) / queries)
        size = math.ceil((last - first) / num_blocks)  # even blocks: no short one at the end
        for start in range(first, last, size):
            stop = min(start + size, last)
            is_cut = window is not None and stop + shift - kv_first > window
            kv_start = max(kv_first, start + shift - window + 1) if is_cut else kv_first
            kv_stop = stop + shift
            runs = slice(kv_start - kv_first, min(kv_stop, own) - kv_first), slice(max(kv_start, own), kv_stop)
            keys = tuple(rows for rows in runs if rows.start < rows.stop)
            yield _Block(start, stop, keys, window if is_cut else None)


def _visible_scores(q: Tensor, k: Tensor, block: _Block, group: int) -> Tensor:
    """q kᵀ, and -inf where a query does not see a key: q (K, n·G, E) scaled, k (K, m, E) -> (K, n·G, m)."""
    scores = torch.bmm(q, k.transpose(1, 2))
    queries, keys = block.stop - block.start, block.num_keys
    by_query = scores.view(len(scores), queries, group, keys)
    if block.window is None:  # all keys before the block are visible: only the last n columns need a mask
        hidden = torch.full((queries, queries), -math.inf, dtype=q.dtype, device=q.device).triu(1)
        by_query[..., keys - queries :] += hidden.unsqueeze(1)
    else:
        query_index = torch.arange(keys - queries, keys, device=q.device).unsqueeze(1)
        distance = query_index - torch.arange(keys, device=q.device)
        visible = (distance >= 0) & (distance < block.window)
        by_query += torch.where(visible, 0.0, -math.inf).to(q.dtype).unsqueeze(1)
    return scores


def _by_kv_head(x_THE: Tensor, kv_heads: int) -> Tensor:
    """(T, H, E) of any float dtype -> a fresh (K, T·G, E) in fp32 (float64 stays); row t·G + g is head k·G + g."""
    tokens, heads, dim = x_THE.shape
    out = torch.empty(
        kv_heads, tokens, heads // kv_heads, dim,
        dtype=torch.promote_types(x_THE.dtype, torch.float32), device=x_THE.device,
    )  # fmt: skip
    out.copy_(x_THE.unflatten(1, (kv_heads, -1)).transpose(0, 1))
    return out.view(kv_heads, -1, dim)


def _put_by_head(out_THE: Tensor, x: Tensor) -> None:
    """The inverse of `_by_kv_head`, rounding into `out_THE`."""
    tokens, heads, dim = out_THE.shape
    kv_heads = len(x)
    group = heads // kv_heads
    out_THE.view(tokens, kv_heads, group, dim).copy_(x.view(kv_heads, tokens, group, dim).transpose(0, 1))
