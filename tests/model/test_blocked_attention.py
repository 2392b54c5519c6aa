"""BlockedAttention. Oracle: the formula with a full mask and PyTorch's autograd, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minift.model import blocked_attention
from minift.model.blocked_attention import BlockedAttention


def attention_by_formula(q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, window: int | None) -> Tensor:
    """One document whose queries are its last tokens."""
    group = q_THE.shape[1] // k_THE.shape[1]
    k, v = k_THE.repeat_interleave(group, dim=1), v_THE.repeat_interleave(group, dim=1)
    query = torch.arange(len(q_THE)).unsqueeze(1) + len(k) - len(q_THE)
    key = torch.arange(len(k))
    hidden = (key > query) | (key <= query - (window or len(k)))
    scores = torch.einsum("qhe,khe->hqk", q_THE, k) / q_THE.shape[-1] ** 0.5
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def bounds(lengths: list[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


# (queries, keys before the first query) of each document; more than 96 queries take more than one block
DOCUMENTS = st.lists(st.tuples(st.integers(1, 130), st.sampled_from([0, 0, 0, 1, 50])), min_size=1, max_size=3)


@given(
    documents=DOCUMENTS,
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    dim=st.integers(1, 4),
    window=st.sampled_from([None, 1, 2, 10, 100, 1000]),
)
def test_values_and_gradients_equal_the_formula(documents, kv_heads, group, dim, window):
    q_lengths, kv_lengths = [n for n, _ in documents], [n + before for n, before in documents]
    q = torch.randn(sum(q_lengths), kv_heads * group, dim, dtype=torch.float64, requires_grad=True)
    k = torch.randn(sum(kv_lengths), kv_heads, dim, dtype=torch.float64, requires_grad=True)
    v = torch.randn(sum(kv_lengths), kv_heads, dim, dtype=torch.float64, requires_grad=True)
    dout = torch.randn_like(q)

    out = BlockedAttention.apply(q, k, v, bounds(q_lengths), bounds(kv_lengths), window)
    parts = zip(q.split(q_lengths), k.split(kv_lengths), v.split(kv_lengths), strict=True)
    expected = torch.cat([attention_by_formula(*part, window) for part in parts])
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)

    ours = torch.autograd.grad(out, (q, k, v), dout)
    theirs = torch.autograd.grad(expected, (q, k, v), dout)
    for gradient, expected_gradient in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_round_only_at_the_end(dtype, window):
    """Inside is fp32, so the result is the exact one rounded, by eps / 2, plus fp32 noise: sums of at most 600 terms,
    below 1e-5 altogether."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(200, heads, 16).to(dtype).requires_grad_() for heads in (6, 2, 2))
    dout = torch.randn(200, 6, 16).to(dtype)
    out = BlockedAttention.apply(q, k, v, [0, 200], [0, 200], window)
    gradients = torch.autograd.grad(out, (q, k, v), dout)

    exact_inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = attention_by_formula(*exact_inputs, window)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, dout.double())
    for ours, theirs in zip((out, *gradients), (exact, *exact_gradients), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=1.01 * torch.finfo(dtype).eps / 2, atol=1e-5)


@pytest.mark.parametrize("window", [None, 300])
def test_extra_memory_is_a_block_of_scores(window, monkeypatch):
    """No tensor of the order tokens² exists: scores never exceed the block budget, whatever the length."""
    largest = 0
    softmax = torch.softmax

    def spy(scores: Tensor, dim: int) -> Tensor:
        nonlocal largest
        largest = max(largest, scores.numel())
        return softmax(scores, dim=dim)

    monkeypatch.setattr(blocked_attention.torch, "softmax", spy)
    q, k, v = torch.randn(3000, 2, 2), torch.randn(3000, 1, 2), torch.randn(3000, 1, 2)
    BlockedAttention.apply(q, k, v, [0, 3000], [0, 3000], window)
    most_keys = 3000 if window is None else window + 96
    assert largest <= min(blocked_attention.SCORES_PER_BLOCK, 96 * 2 * most_keys)
