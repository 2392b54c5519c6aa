"""Embedding. Oracle: `nn.Embedding` in float64, and arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minift.grad_slot import GradSlot, lay_slot
from minift.model.embedding import Embedding
from minift.planner.meter import TensorMeter


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


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(1, 5), st.booleans(), st.booleans())
def test_gradients_on_a_gpu(tokens, dim, has_slot, is_narrow):
    """As far as a CPU can show them. To a slot they come unrounded: n additions, in fp32, of values in that of dy."""
    dtype = torch.bfloat16 if has_slot and is_narrow else torch.float32
    embedding = Embedding(7, dim).to(dtype)
    tokens = torch.tensor(tokens).view(1, -1)
    dy = torch.randn(*tokens.shape, dim).to(dtype)
    slot = GradSlot(torch.full((7, dim), float("nan"))) if has_slot else None
    lay_slot(embedding.weight, slot)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
        embedding(tokens).backward(dy)
    assert (embedding.weight.grad is None) == has_slot
    actual = slot.tensor if has_slot else embedding.weight.grad
    rows = dy[0].double()
    exact, absolute = (torch.zeros(7, dim).double().index_add(0, tokens[0], x) for x in (rows, rows.abs()))
    assert ((actual.double() - exact).abs() <= tokens.numel() * 2.0**-24 * absolute).all()


def test_a_gpu_makes_no_gradient_as_large_as_the_table(monkeypatch):
    embedding = Embedding(1000, 8).bfloat16()
    lay_slot(embedding.weight, GradSlot(torch.empty(1000, 8)))
    rows = embedding(torch.arange(5))
    dy = torch.ones_like(rows)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    with TensorMeter() as meter:
        rows.backward(dy)
    assert meter.peak_bytes == 5 * 8 * 4
