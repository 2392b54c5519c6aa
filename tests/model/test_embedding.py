"""Embedding. Oracle: `nn.Embedding` in float64, and arithmetic."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minift.model.embedding import Embedding


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(1, 5))
def test_values_and_gradients(tokens, dim):
    weight = torch.randn(7, dim)
    dy = torch.randn(len(tokens), dim)
    ours, theirs = Embedding(7, dim), nn.Embedding(7, dim).double()
    with torch.no_grad():
        ours.weight.copy_(weight)
        theirs.weight.copy_(weight)
    tokens = torch.tensor(tokens)

    y = ours(tokens)
    y.backward(dy)
    theirs(tokens).backward(dy.double())
    assert torch.equal(y, weight[tokens])
    torch.testing.assert_close(ours.weight.grad.double(), theirs.weight.grad, rtol=1e-5, atol=1e-5)


def test_a_frequent_token_loses_nothing_in_bf16():
    """4096 times 1: a running bf16 sum stops at 256, where adding 1 no longer changes it."""
    embedding = Embedding(2, 3).bfloat16()
    embedding(torch.zeros(4096, dtype=torch.int64)).sum().backward()
    assert embedding.weight.grad.dtype == torch.bfloat16
    assert torch.equal(embedding.weight.grad, torch.tensor([[4096.0] * 3, [0.0] * 3], dtype=torch.bfloat16))
