"""Causal attention over packed documents, forward and backward, with grouped queries and a sliding window.

    s = q kᵀ / √E     p = softmax of the visible s     out = p v     lse = log Σ e^s
    dv = pᵀ dout      ds = p (dout vᵀ - Σ_e dout out)  dq = ds k / √E      dk = dsᵀ q / √E

Paper: Dao et al. 2022, arXiv 2205.14135: blocks of keys with online softmax (algorithm 1), p from lse in backward
instead of another softmax (algorithm 4). The compiled kernel works on a block of queries and 64 keys at a time in a
core's cache, the plain-PyTorch one (blocked_attention.py) on a block of queries and all their keys. fp32 inside, and
nothing of the size T². Backward keeps q, k, v, out and lse; out costs nothing where the next projection keeps its
input. As out is rounded, the row sum in ds is that of dout with the rounded out, here as in every flash attention.

Documents may share their first keys (a prefix that is trained, a prompt that stands before all of them): these lie once
in front of all others and are read from there, with one softmax over both. The alternative, a softmax for each part put
together by their lse, needs a backward through lse, and reads q twice.

Why not `scaled_dot_product_attention`: on a CPU its backward is slow, and it cannot be told of a window except by a T²
mask. CPU time of forward + backward in ms, bf16, 9/3 heads of 64, on a shared Zen 3 core (AVX2; torch multiplies fp32
matrices at 95 GFLOP/s on it); `python benchmarks/ops_cpu.py` repeats the comparison:

    documents (tokens)   one call each, `enable_gqa`   blocked_attention.py     compiled
    30 of 40                 5.3 +   33.7                  7.5 +  15.4           1.9 +   3.7
    8 of 100-250            13.2 +  147.4                 13.2 +  26.9           5.5 +  11.8
    1 of 512                10.6 +  176.1                  8.5 +  16.8           4.4 +   9.9
    1 of 2048               94.9 + 1749.0                103.5 + 210.0          63.8 + 152.0
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minift.ops import extension
from minift.ops.blocked_attention import blocked_attention, blocked_attention_backward


def causal_attention(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, q_bounds: Tensor, kv_bounds: Tensor, window: int | None = None
) -> Tensor:
    """softmax(q kᵀ / √E) v inside each document, causal: (T, H, E) in q's dtype. Differentiable once in q, k and v.

    q (T, H, E), k and v (T', K, E) of one dtype, tokens and heads may be strided; query head h sees key head
    h // (H/K). Document s has the queries [q_bounds[s], q_bounds[s+1]) and the keys [kv_bounds[s], kv_bounds[s+1]), its
    queries being its *last* tokens; bounds are int32 of one dimension and end with T or T'. With a window w, a token
    sees its own key and the w-1 before it. float64 stays float64. Compiled: the same bits with any number of threads,
    and in whatever pack a document is.

    Keys before kv_bounds[0] are shared: every document has them, in front of its own. Queries before q_bounds[0] are
    the last tokens of these shared keys: none (a prefix), or all (a prompt that is computed along with the pack).
    """
    _check("causal_attention", q_THE, k_TKE, v_TKE, q_bounds, kv_bounds, window)
    return _CausalAttention.apply(q_THE, k_TKE, v_TKE, q_bounds, kv_bounds, window)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, q_bounds: Tensor, kv_bounds: Tensor, window: int | None
    ) -> Tensor:
        forward = blocked_attention if q_THE.dtype == torch.float64 else _attention
        out_THE, lse_TH = forward(q_THE, k_TKE, v_TKE, q_bounds, kv_bounds, window)
        ctx.save_for_backward(q_THE, k_TKE, v_TKE, out_THE, lse_TH, q_bounds, kv_bounds)
        ctx.window = window
        return out_THE

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_THE: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        backward = blocked_attention_backward if dout_THE.dtype == torch.float64 else _attention_backward
        return *backward(dout_THE, *ctx.saved_tensors, ctx.window), None, None, None


def _check(
    op: str, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, q_bounds: Tensor, kv_bounds: Tensor, window: int | None
) -> None:
    shapes = f"q is {tuple(q_THE.shape)} {q_THE.dtype}, k {tuple(k_TKE.shape)} {k_TKE.dtype}"
    if k_TKE.shape != v_TKE.shape or not q_THE.dtype == k_TKE.dtype == v_TKE.dtype:
        raise ValueError(
            f"{op}: {shapes}, v {tuple(v_TKE.shape)} {v_TKE.dtype}; k and v must have one shape, all three one dtype"
        )
    if q_THE.dim() != 3 or k_TKE.dim() != 3 or q_THE.shape[2] != k_TKE.shape[2] or q_THE.shape[1] % k_TKE.shape[1]:
        raise ValueError(f"{op}: {shapes}; expected (T, H, E) and (T', K, E) where K divides H")
    for name, bounds in (("q_bounds", q_bounds), ("kv_bounds", kv_bounds)):
        if bounds.dtype != torch.int32 or bounds.shape != q_bounds.shape or bounds.dim() != 1 or len(bounds) == 0:
            raise ValueError(
                f"{op}: {name} is {bounds.dtype} {tuple(bounds.shape)}; q_bounds and kv_bounds must be int32 of one "
                "dimension, one longer than there are documents"
            )
    if window is not None and window < 1:
        raise ValueError(f"{op}: window is {window}; valid: None, or 1 (a token sees itself) and more")


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, q_bounds: Tensor, kv_bounds: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


def _attention_backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    q_bounds: Tensor, kv_bounds: Tensor, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_attention = extension.op("attention", reference=blocked_attention, fake=_attention_fake)
_attention_backward = extension.op(
    "attention_backward", reference=blocked_attention_backward, fake=_attention_backward_fake
)
