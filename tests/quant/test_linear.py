"""The NF4 projection as a module: what it holds, its products, storing another weight.

Oracles: the quantising functions (held to bitsandbytes by tests/ops/test_nf4.py) for bytes, and for products the same
weights, dequantised, in fp64. Gradients: tests/model/test_project.py has NF4 among its projections.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from minift.ops.nf4 import quantize_nf4, quantize_scales
from minift.ops.nf4_tables import CODEBOOK
from minift.quant.linear import NF4Linear

CPU = torch.device("cpu")


def make(weight: Tensor, bias: Tensor | None, block_size: int, double_quant: bool) -> NF4Linear:
    """Its parameters filled by hand, from the quantising functions."""
    out_features, in_features = weight.shape
    linear = NF4Linear(in_features, out_features, bias is not None, block_size, double_quant, weight.dtype, CPU)
    codes, absmax = quantize_nf4(weight, block_size)
    linear.hold("codes", codes)
    if double_quant:
        scales, nested_absmax, offset = quantize_scales(absmax)
        linear.hold("scales", scales)
        linear.hold("nested", torch.cat([offset, nested_absmax]).view(torch.uint8))
    else:
        linear.hold("scales", absmax.view(torch.uint8))
    if bias is not None:
        linear.bias.data.copy_(bias)
    return linear


shapes = {
    "out_features": st.integers(1, 20),
    "in_features": st.one_of(st.integers(1, 40), st.sampled_from([32, 64, 96, 128, 256])),
    "block_size": st.sampled_from([32, 64]),
    "double_quant": st.booleans(),
    "has_bias": st.booleans(),
    "dtype": st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    "seed": st.integers(0, 2**31),
}


@given(num_tokens=st.sampled_from([1, 3, 16, 17, 40]), **shapes)
def test_products(num_tokens, out_features, in_features, block_size, double_quant, has_bias, dtype, seed):
    """|error| <= (4 u + 2 n 2^-24) (|factors| multiplied), u the unit roundoff: an element of the weight may have been
    rounded once more than in `dense_weight`, and products, the sum with a bias and with what is added to, once each;
    sums of n terms are fp32. In fp64 they are fp64, so both roundoffs are its own."""
    torch.manual_seed(seed)
    bias = torch.randn(out_features, dtype=dtype) if has_bias else None
    linear = make(torch.randn(out_features, in_features, dtype=dtype), bias, block_size, double_quant)
    weight = linear.dense_weight()
    assert weight.dtype == dtype and weight.shape == (out_features, in_features)
    W = weight.double()
    unit = torch.finfo(dtype).eps / 2
    sums = min(2.0**-24, unit)

    x = torch.randn(num_tokens, in_features, dtype=dtype)
    out = linear.product(x)
    exact, size = x.double() @ W.T, x.double().abs() @ W.abs().T
    if has_bias:
        exact, size = exact + bias.double(), size + bias.double().abs()
    assert out.dtype == dtype
    assert ((out.double() - exact).abs() <= (4 * unit + 2 * in_features * sums) * size).all()

    earlier = torch.randn(num_tokens, out_features, dtype=dtype)
    exact, size = x.double() @ W.T + earlier.double(), x.double().abs() @ W.abs().T + earlier.double().abs()
    total = earlier.clone()
    assert linear.product(x, total) is total  # with its bias, if it has one
    assert ((total.double() - exact).abs() <= (5 * unit + 2 * in_features * sums) * size).all()

    dy = torch.randn(num_tokens, out_features, dtype=dtype)
    added_to = torch.randn(num_tokens, in_features, dtype=dtype)
    exact, size = dy.double() @ W, dy.double().abs() @ W.abs()
    bound = 4 * unit + 2 * out_features * sums
    fresh = linear.product_dx(dy)
    assert fresh.dtype == dtype and ((fresh.double() - exact).abs() <= bound * size).all()
    exact, size = exact + added_to.double(), size + added_to.double().abs()
    assert linear.product_dx(dy, added_to) is added_to
    assert ((added_to.double() - exact).abs() <= bound * size).all()


@given(**shapes)
def test_storing(out_features, in_features, block_size, double_quant, has_bias, dtype, seed):
    """The bytes of the new weight and everything else of the old one; every element the nearest that there is."""
    torch.manual_seed(seed)
    bias = torch.randn(out_features, dtype=dtype) if has_bias else None
    old = make(torch.randn(out_features, in_features, dtype=dtype), bias, block_size, double_quant)
    before = {name: parameter.clone() for name, parameter in old.named_parameters()}
    weight = torch.randn(out_features, in_features) * 3
    new = old.storing(weight)
    expected = make(weight.to(torch.float32), bias, block_size, double_quant)
    assert new.dtype == old.dtype and new.block_size == block_size and new.double_quant == double_quant
    assert new.bias is old.bias
    assert [name for name, _ in new.named_parameters()] == [name for name, _ in old.named_parameters()]
    for name, parameter in new.named_parameters():
        assert not parameter.requires_grad
        if name != "bias":
            assert torch.equal(parameter, expected.get_parameter(name)), name
    assert all(torch.equal(parameter, before[name]) for name, parameter in old.named_parameters())
    if not double_quant:
        scale = quantize_nf4(weight, block_size)[1].repeat_interleave(block_size)[: weight.numel()]
        error = (new.dense_weight().double() - weight).abs().flatten()
        # Half the widest gap between levels; fp32 roundings of the quotient, and the dtype's of the result.
        bound = CODEBOOK.diff().max().double() / 2 + 4 * 2.0**-24 + torch.finfo(dtype).eps / 2
        assert (error <= bound * scale).all()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("numel", [(1, 1), (3, 7), (64, 64), (129, 128)])
def test_bytes_are_the_closed_form(numel: tuple[int, int], double_quant: bool) -> None:
    out_features, in_features = numel
    linear = NF4Linear(in_features, out_features, True, 64, double_quant, torch.bfloat16, torch.device("meta"))
    n = out_features * in_features
    blocks = -(-n // 64)
    sizes = {"codes": -(-n // 2), "scales": blocks if double_quant else 4 * blocks}
    if double_quant:
        sizes["nested"] = 4 + 4 * -(-blocks // 256)
    assert {name: p.numel() for name, p in linear.named_parameters() if p.dtype == torch.uint8} == sizes
    assert linear.bias.shape == (out_features,) and linear.bias.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in linear.parameters())


def test_a_tensor_of_another_size_or_dtype_is_not_held():
    linear = make(torch.randn(4, 64), None, 64, True)
    for values in (torch.zeros(127, dtype=torch.uint8), torch.zeros(128)):
        with pytest.raises(AssertionError, match="codes"):
            linear.hold("codes", values)
    assert isinstance(linear.codes, nn.Parameter)
