"""INT4 and INT8 absmax against the formula in fp64, and NF4 against both on normal weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minift.ops import absmax, nf4


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 3000),
    num_bits=st.sampled_from(absmax.BITS),
    block_size=st.sampled_from(nf4.BLOCK_SIZES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_the_error_is_at_most_half_a_step(n, num_bits, block_size, dtype, seed):
    weight = torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    codes, scales = absmax.quantize_absmax(weight, num_bits, block_size)
    largest = 2 ** (num_bits - 1) - 1
    assert codes.dtype == torch.int8 and codes.abs().max() <= largest
    step = scales.double().repeat_interleave(block_size)[:n] / largest
    error = absmax.dequantize_absmax(codes, scales, num_bits, block_size).double() - weight.double()
    # Each of division, two products and one sum rounds a number of at most `largest` steps by 2^-24 of itself.
    assert (error.abs() <= step * (0.5 + 4 * largest * 2.0**-24)).all()


def test_blocks_of_zeros():
    codes, scales = absmax.quantize_absmax(torch.zeros(100), 4)
    assert torch.equal(absmax.dequantize_absmax(codes, scales, 4), torch.zeros(100))


def test_nf4_is_between_them_on_normal_weights():
    weight = torch.randn(2**16, generator=torch.Generator().manual_seed(0))

    def error(restored: torch.Tensor) -> float:
        return ((restored - weight).square().mean() / weight.square().mean()).sqrt().item()

    codes, scales = nf4.quantize_nf4(weight)
    nf4_error = error(nf4.dequantize_nf4(nf4.Nf4(codes=codes, absmax=scales, shape=(2**16,)), torch.float32))
    int4_error, int8_error = (
        error(absmax.dequantize_absmax(*absmax.quantize_absmax(weight, num_bits), num_bits)) for num_bits in (4, 8)
    )
    assert int8_error < 0.1 * nf4_error < 0.1 * int4_error


def test_other_numbers_of_bits_are_refused():
    with pytest.raises(ValueError, match="the number of bits is 3; expected one of .4, 8."):
        absmax.quantize_absmax(torch.ones(4), 3)


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN or an infinity"):
        absmax.quantize_absmax(torch.tensor([1.0, float("nan")]), 8)
