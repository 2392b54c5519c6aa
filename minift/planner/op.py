"""Operations on paper: what kind each is, how much it computes and how much memory it touches.

`bytes` counts every operand that is read and every result that is written once, as if nothing stayed in a cache;
`flops` counts multiplications and additions of matrix products and attention. How long an operation of a kind takes is
`device`'s business, which was measured on operations made by these same functions (`calibrate`).

    matrix products, (M, K) times (K, N); r: a rank
        linear            x Wᵀ       T, in, out         x A       x Aᵀ       T, in, r
        input gradient    dy W       T, out, in         h B       h Bᵀ       T, r, out
        weight gradient   dyᵀ x      out, T, in         dy B      dy B       T, out, r
                                                        g A       g A        T, r, in
                                                        dy h      dyᵀ h      out, T, r
                                                        g x       gᵀ x       r, T, in
                                                        dy B h    dy B and dyᵀ h, dy read once
    attention, attention backward                       over the visible pairs of tokens, see `attention`
    rms norm, swiglu, each with its backward; rope      per element of their input
    updated swiglu, its backward                        with the low-rank updates of gate and up, or dy, made on the way
    dequantize, dequantize columns                      NF4 weights, in the order of memory, or by columns
    embedding, embedding backward                       rows of a table, taken and added up
    softmax                                             logits to their gradient, with the loss
    add, copy, scale, cast, sum, dropout                element-wise: a + b; a to the same dtype or another; a number
                                                        times a; addends of ranks; zeros
    adamw, adamw 8bit, square sum                       per weight of a shard
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}
LOW_RANK = ("x A", "h B", "dy B", "g A", "dy h", "g x", "dy B h")
UPDATED = ("updated swiglu", "updated swiglu backward")
PRODUCTS = ("linear", "input gradient", "weight gradient", *LOW_RANK)


@dataclass(frozen=True)
class Op:
    """`count` equal operations of a kind in a dtype; flops and bytes are of one."""

    kind: str
    dtype: str
    bytes: float
    flops: float = 0.0
    count: int = 1


def total_flops(ops: Iterable[Op]) -> float:
    return sum(op.flops * op.count for op in ops)


def total_bytes(ops: Iterable[Op]) -> float:
    return sum(op.bytes * op.count for op in ops)


def product(kind: str, dtype: str, m: int, k: int, n: int, count: int = 1) -> Op:
    """(m, k) times (k, n): 2 m k n."""
    assert kind in PRODUCTS, kind
    return Op(kind, dtype, (m * k + k * n + m * n) * ITEMSIZE[dtype], 2 * m * k * n, count)


def both_of_dy(dtype: str, tokens: int, out_features: int, rank: int) -> Op:
    """dy B and dyᵀ h: dy, B and h are read, g and the gradient of B are written."""
    elements = tokens * out_features + 2 * rank * (tokens + out_features)
    return Op("dy B h", dtype, elements * ITEMSIZE[dtype], 4 * tokens * out_features * rank)


def updated_swiglu(kind: str, dtype: str, tokens: int, width: int, ranks: int, tensors: float) -> Op:
    """Reads and writes `tensors` tensors (tokens, width), and reads narrow matrices and factors of `ranks` in all."""
    assert kind in UPDATED, kind
    elements = tensors * tokens * width + ranks * (tokens + width)
    return Op(kind, dtype, elements * ITEMSIZE[dtype], 2 * tokens * width * ranks)


def elementwise(kind: str, dtype: str, elements: float, tensors: float, count: int = 1) -> Op:
    """Reads and writes `tensors` tensors of so many elements."""
    return Op(kind, dtype, elements * tensors * ITEMSIZE[dtype], 0.0, count)


def cast(from_dtype: str, to_dtype: str, elements: float) -> Op:
    """From one dtype to another, of the kind of the narrower; a copy if they are the same (of bytes: as of bf16)."""
    narrow = min(from_dtype, to_dtype, key=ITEMSIZE.__getitem__)
    moved = elements * (ITEMSIZE[from_dtype] + ITEMSIZE[to_dtype])
    return Op("copy" if from_dtype == to_dtype else "cast", "bfloat16" if narrow == "uint8" else narrow, moved)


def dequantize(dtype: str, weights: float, block_size: int, nested: bool, columns: bool, count: int = 1) -> Op:
    """NF4 to `dtype`: half a byte of code a weight, and a scale of one byte (nested) or four for each block."""
    stored = weights * (0.5 + (1 if nested else 4) / block_size)
    return Op("dequantize columns" if columns else "dequantize", dtype, stored + weights * ITEMSIZE[dtype], 0.0, count)


def visible_pairs(lengths: Iterable[int], window: int | None) -> int:
    """(query, key) pairs in causal attention inside documents of these lengths, with a sliding window if there is one.

    n (n + 1) / 2 of n tokens, less (n - w) (n - w + 1) / 2 beyond a window w."""
    pairs = 0
    for n in lengths:
        beyond = 0 if window is None else max(0, n - window)
        pairs += n * (n + 1) // 2 - beyond * (beyond + 1) // 2
    return pairs


def attention(dtype: str, tokens: int, pairs: int, heads: int, kv_heads: int, head_dim: int) -> tuple[Op, Op]:
    """Forward and backward: two products for each visible pair, head and dimension (scores, output), and five (scores
    again, dv, dp, dq, dk); Dao et al. 2022, arXiv 2205.14135, algorithms 1 and 4."""
    multiplications = 2 * pairs * heads * head_dim
    queries, keys = tokens * heads * head_dim, tokens * kv_heads * head_dim
    return (
        Op("attention", dtype, (2 * queries + 2 * keys) * ITEMSIZE[dtype], 2 * multiplications),
        Op("attention backward", dtype, (4 * queries + 4 * keys) * ITEMSIZE[dtype], 5 * multiplications),
    )
