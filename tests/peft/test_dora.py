"""DoRA's norms against fp64; PEFT's own layer for dropout; rows of zeros. The rest: test_matrix.py."""

from __future__ import annotations

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minift.model.linear import Linear, LinearBase
from minift.ops.nf4 import dequantize_nf4
from minift.peft.dora import DoraConfig, DoraLinear
from minift.peft.manage import constant_weights
from minift.quant.linear import NF4Linear

CPU = torch.device("cpu")


def wrapped(base: LinearBase, config: DoraConfig) -> DoraLinear:
    """With random values."""
    adapter = config.wrap("x", base, torch.float32, CPU)
    for _, parameter in adapter.own_parameters():
        nn.init.normal_(parameter, std=0.3)
    return adapter


def nf4(weight: torch.Tensor, block_size: int, double_quant: bool) -> NF4Linear:
    rows, columns = weight.shape
    kind = NF4Linear(columns, rows, False, block_size, double_quant, torch.float32, torch.device("meta"))
    return kind.storing(weight)


@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(64, 96), (7, 33), (5, 128), (300, 1025), (1100, 256)]),  # the last two: several slices
    rank=st.integers(1, 5),
    base=st.sampled_from(["float32", "bfloat16", "float16", "nf4-32", "nf4-64"]),
    log_scale=st.floats(-4, 2),
)
def test_norms_are_exact_to_the_rounding_of_fp32(seed, shape, rank, base, log_scale):
    """The square of a norm is a sum of three terms; each is a sum of products in fp32. What is lost is relative to the
    sum of their absolute values, which is |W|^2 + 2 |W Aᵀ||B| + (|B| |A|)^2, and where rows cancel that is more than
    the norm's own rounding. Vectorised sums err by a few units, not by a unit per element: 16."""
    torch.manual_seed(seed)
    weight = torch.randn(shape)
    if base.startswith("nf4"):
        linear = nf4(weight, int(base[4:]), seed % 2 == 0)
        W = dequantize_nf4(linear.nf4(), torch.float64).view(shape)
    else:
        linear = Linear.holding(weight.to(getattr(torch, base)), None)
        W = linear.weight.double()
    adapter = wrapped(linear, DoraConfig(r=rank, alpha=10.0**log_scale))
    A, B = adapter.lora_A.weight.double(), adapter.lora_B.weight.double() * adapter.scale
    W_norm, V_norm = adapter._norms(torch.float32)
    terms = W.square().sum(1) + 2 * (B.abs() * (W.abs() @ A.abs().T)).sum(1) + (B.abs() @ A.abs()).square().sum(1)
    for norm, exact in ((W_norm, W.norm(dim=1)), (V_norm, (W + B @ A).norm(dim=1))):
        assert ((norm.double() ** 2 - exact**2).abs() <= 16 * 2.0**-24 * terms).all()
    adapter.lora_B.weight.data.zero_()
    W_norm, V_norm = adapter._norms(torch.float32)
    assert torch.equal(W_norm, V_norm)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_is_peft_s_dropout_included(dropout, has_bias):
    """The same seed zeroes the same elements: PEFT's layer draws from torch's generator once, as this does."""
    torch.manual_seed(0)
    linear = nn.Linear(12, 7, bias=has_bias)
    base = Linear.holding(linear.weight.detach().clone(), linear.bias)
    ours = wrapped(base, DoraConfig(r=3, alpha=6, dropout=dropout)).train()
    settings = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, use_dora=True, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(linear), settings).train().base_model.model[0]
    magnitude = theirs.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(ours.lora_A.weight)
        theirs.lora_B["default"].weight.copy_(ours.lora_B.weight)
        stored = ours.to_file("lora_magnitude_vector", ours.lora_magnitude_vector.detach(), base.dense_weight)
        magnitude.copy_(stored)
    outs, grads = [], []
    for layer, parameters in (
        (ours, [ours.lora_A.weight, ours.lora_B.weight, ours.lora_magnitude_vector]),
        (theirs, [theirs.lora_A["default"].weight, theirs.lora_B["default"].weight, magnitude]),
    ):
        x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(2)
        out = layer(x)
        out.square().sum().backward()
        outs.append(out)
        grads.append([x.grad, *(parameter.grad for parameter in parameters)])
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)
    for our_grad, their_grad in zip(*grads, strict=True):
        torch.testing.assert_close(our_grad, their_grad, rtol=1e-4, atol=1e-4)
    if dropout:
        assert not torch.equal(outs[0], ours.eval()(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_zeros_stays_one_and_is_no_nan(dtype):
    """Padding of vocabularies has them; ‖W‖ is 0, and m / ‖V‖ would be 0 / 0. (In PEFT it is.)"""
    weight = torch.randn(6, 8)
    weight[2] = 0.0
    adapter = DoraConfig(r=2).wrap("x", Linear.holding(weight.to(dtype), None), dtype, CPU)
    for name, parameter in adapter.own_parameters():
        parameter.data.copy_(adapter.init_parameter(name, torch.Generator().manual_seed(0)))
    x = torch.randn(3, 8).to(dtype)
    out = adapter(x)
    assert out[:, 2].eq(0).all() and torch.equal(out, adapter.base(x))
    out.sum().backward()
    assert all(parameter.grad.isfinite().all() for _, parameter in adapter.own_parameters())
    assert adapter.dense_weight().isfinite().all()


def test_norms_are_made_once_while_no_weight_changes(monkeypatch):
    adapter = wrapped(Linear.holding(torch.randn(6, 8), None), DoraConfig(r=2))
    model, x, calls = nn.Sequential(adapter), torch.randn(3, 8), []
    norms = adapter._norms
    monkeypatch.setattr(adapter, "_norms", lambda dtype: calls.append(dtype) or norms(dtype))
    before = model(x)
    with constant_weights(model):
        assert torch.equal(model(x), before) and torch.equal(model(x), before)
    assert len(calls) == 2
    adapter.lora_B.weight.data.mul_(2.0)
    with constant_weights(model):
        assert not torch.equal(model(x), before)
    adapter.lora_B.weight.data.mul_(0.5)
    assert torch.equal(model(x), before)
