"""RMSNorm. Oracles: transformers' LlamaRMSNorm for values, finite differences in float64 for gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from minift.model.norm import RMSNorm


@given(
    leading=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    dim=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_values_equal_transformers(leading, dim, dtype):
    """One unit in the last place: the mean may be summed in another order, which can flip a rounding."""
    x = torch.randn(*leading, dim).to(dtype)
    ours, theirs = RMSNorm(dim, 1e-5).to(dtype), LlamaRMSNorm(dim, 1e-5).to(dtype)
    with torch.no_grad():
        theirs.weight.copy_(torch.randn(dim))
        ours.weight.copy_(theirs.weight)
    rtol = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours(x), theirs(x), rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 4), (3, 2, 4)])
def test_gradients(shape):
    norm = RMSNorm(4, 1e-5).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64)

    def apply(x, w):
        norm.weight.data = w.detach()
        return norm(x)

    assert torch.autograd.gradcheck(lambda x: apply(x, weight), (x,))

    norm.weight.data = weight
    dy = torch.randn(shape, dtype=torch.float64)
    norm(x).backward(dy)
    normed = x.detach() * torch.rsqrt(x.detach().square().mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(norm.weight.grad, (dy * normed).flatten(0, -2).sum(0))


@given(trains=st.booleans(), x_needs=st.booleans(), seed=st.integers(0, 99))
def test_a_residual_s_gradient_has_the_bits_of_an_addition(trains, x_needs, seed):
    generator = torch.Generator().manual_seed(seed)
    x, factor, dy, dresidual = (torch.randn(3, 2, 8, generator=generator).bfloat16() for _ in range(4))
    norm = RMSNorm(8, 1e-5).bfloat16().requires_grad_(trains)
    norm.weight.data = torch.randn(8, generator=generator).bfloat16()

    def gradients(of_both):
        leaf, norm.weight.grad = x.clone().requires_grad_(x_needs), None
        y, residual = of_both(leaf * factor)  # not a leaf, as in a model
        assert torch.equal(residual, x * factor) and residual.requires_grad == x_needs
        outputs = [(of, grad) for of, grad in ((y, dy), (residual, dresidual)) if of.requires_grad]
        if outputs:
            torch.autograd.backward(*zip(*outputs, strict=True))
        return leaf.grad, norm.weight.grad

    for one, two in zip(gradients(norm.with_residual), gradients(lambda x: (norm(x), x)), strict=True):
        assert (one is None) == (two is None) and (one is None or torch.equal(one, two))


def test_a_residual_alone_has_a_gradient():
    norm = RMSNorm(4, 1e-5)
    x = torch.randn(3, 4, requires_grad=True)
    norm.with_residual(x)[1].sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 4)) and norm.weight.grad is None


def test_a_frozen_weight_gets_no_gradient():
    norm = RMSNorm(4, 1e-5)
    torch.nn.init.ones_(norm.weight)
    norm.weight.requires_grad_(False)
    x = torch.randn(3, 4, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None and norm.weight.grad is None
