"""`stretch` against autograd in fp64, in every dtype; how little it keeps and what it does not round."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minift.peft.stretch import Fixed, stretch, stretch_


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 9) | st.sampled_from([128, 129, 300]),
    columns=st.integers(1, 9),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    change_dtype=st.sampled_from([torch.float32, None]),
    is_column=st.booleans(),
    kind=st.sampled_from(["plain", "fixed", "bias"]),
    in_place=st.booleans(),
)
def test_against_autograd(seed, rows, columns, dtype, change_dtype, is_column, kind, in_place):
    """x + f (x - b) is three roundings, f two more; a gradient of `change` is a sum over rows of rounded products. In
    place, x is made of the rounded result, whose error is divided by 1 + f."""
    torch.manual_seed(seed)
    x = torch.randn(rows, columns).to(dtype).requires_grad_()
    change = torch.randn((columns, 1) if is_column else (1, columns)).to(change_dtype or dtype)
    change = nn.Parameter(change)
    inner = torch.promote_types(dtype, torch.float32)
    fixed = None
    if kind != "plain":
        bias = nn.Parameter(torch.randn(columns).to(dtype), requires_grad=False) if kind == "bias" else None
        fixed = Fixed(torch.rand(columns, dtype=inner), torch.randn(columns, dtype=inner), bias)
    before = x * 1.0
    out = stretch_(before, change, fixed) if in_place else stretch(before, change, fixed)
    assert in_place == (out.data_ptr() == before.data_ptr()) or out.numel() == 0
    weights = torch.randn(rows, columns).to(dtype)
    (out * weights).sum().backward()

    x64, change64 = x.detach().double().requires_grad_(), change.detach().double().requires_grad_()
    f = change64.view(-1) if fixed is None else fixed.gain * change64.view(-1) + fixed.offset
    b = torch.zeros(columns) if fixed is None or fixed.bias is None else fixed.bias
    (exact := x64 + f * (x64 - b)).mul(weights).sum().backward()
    eps = torch.finfo(torch.promote_types(dtype, torch.bfloat16)).eps if dtype != torch.float64 else 1e-7
    size = x64.abs() + f.abs() * (x64.abs() + b.abs())
    assert out.dtype == dtype and (out - exact).abs().le(4 * eps * size).all()
    assert (x.grad - x64.grad).abs().le(4 * eps * (1 + f.abs()) * weights.abs()).all()
    assert change.grad.dtype == change.dtype and change.grad.shape == change.shape
    error = (change.grad.double() - change64.grad).abs().view(-1)
    gain = 1.0 if fixed is None else fixed.gain
    if in_place:
        gain = gain / (1 + f).abs()
        x64 = size + b.abs()
    assert error.le(6 * eps * gain * (weights.abs() * (x64.abs() + b.abs())).sum(0) + 1e-30).all()


def test_a_factor_of_zero():
    """Out of place its gradient is there, in place it is taken for zero, and not for 0 / 0."""
    x, change = torch.randn(3, 2), nn.Parameter(torch.tensor([-1.0, 0.5]))
    stretch(x, change).sum().backward()
    torch.testing.assert_close(change.grad, x.sum(0))
    expected, change.grad = x.sum(0), None
    stretch_(x * 1.0, change).sum().backward()
    torch.testing.assert_close(change.grad, torch.stack([torch.tensor(0.0), expected[1]]))


def test_a_change_too_small_for_16_bits_beside_one_is_not_lost():
    x, change = torch.full((1, 1), 256.0, dtype=torch.bfloat16), nn.Parameter(torch.full((1,), 2.0**-10).bfloat16())
    assert (1 + change).item() == 1.0
    large = torch.full((1, 1), 2.0**20, dtype=torch.bfloat16)
    assert torch.equal(stretch(x, nn.Parameter(torch.zeros(1))), x)
    assert stretch(large, nn.Parameter(torch.full((1,), 2.0**-7))).item() == 2.0**20 + 2.0**13
    assert change.item() > 0


def test_it_reads_the_change_again_in_backward():
    """As a gather buffer that other blocks have overwritten in the meantime, and that is back."""
    x, change = torch.randn(3, 4, requires_grad=True), nn.Parameter(torch.randn(4))
    out, kept = stretch(x, change), change.detach().clone()
    change.data = torch.full((4,), float("nan"))
    change.data = kept
    out.sum().backward()
    torch.testing.assert_close(x.grad, (1 + kept).expand(3, 4))


@pytest.mark.parametrize("function", [stretch, stretch_])
@pytest.mark.parametrize("needs_change", [True, False])
def test_what_is_saved(needs_change, function):
    """x or, in place, the result, if there is a gradient to be made of it, and nothing else."""
    x, change = torch.randn(3, 4, requires_grad=True) * 1.0, nn.Parameter(torch.randn(4), requires_grad=needs_change)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = function(x.view(3, 4), change, Fixed(torch.ones(4), torch.ones(4), None))
    kept = x if function is stretch else out
    assert [tensor.data_ptr() for tensor in saved] == ([kept.data_ptr()] if needs_change else [])
