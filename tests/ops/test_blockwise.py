"""8-bit block-wise quantisation in plain PyTorch. Oracles: bitsandbytes' map and its portable definition (argmin)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minift.ops.blockwise import BLOCK, ZERO_CODES, dequantize_blockwise, dynamic_map, quantize_blockwise

MAPS = [dynamic_map(signed=True), dynamic_map(signed=False)]
is_signed = pytest.mark.parametrize("dynamic_map", MAPS, ids=["signed", "unsigned"])
SPACING = {True: 0.9 / 64, False: 0.9 / 128}  # of the values in the highest decade


def draw(n: int, seed: int, dynamic_map) -> Tensor:
    """Values of every magnitude, some of them zero; not negative for the unsigned map."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator) * 10.0 ** torch.randint(-9, 3, (n,), generator=generator)
    values[torch.rand(n, generator=generator) < 0.1] = 0.0
    return values if dynamic_map.values[0] < 0 else values.square()


@is_signed
def test_the_map_is_bitsandbytes(dynamic_map) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    theirs = bnb.create_dynamic_map(signed=bool(dynamic_map.values[0] < 0))
    assert torch.equal(dynamic_map.values, theirs)
    assert dynamic_map.values[ZERO_CODES[bool(theirs[0] < 0)]] == 0


@is_signed
@given(n=st.integers(1, 600), seed=st.integers(0, 999))
def test_codes_are_the_nearest_and_absmax_the_largest(dynamic_map, n: int, seed: int) -> None:
    values = draw(n, seed, dynamic_map)
    codes, absmax = quantize_blockwise(values, dynamic_map)
    blocks = values.split(BLOCK)
    assert codes.dtype == torch.uint8 and len(codes) == n
    assert torch.equal(absmax, torch.tensor([block.abs().max() for block in blocks]))
    for block, block_codes, largest in zip(blocks, codes.split(BLOCK), absmax, strict=True):
        # bitsandbytes' backends/default: the first of the nearest.
        normed = (block * (1 / largest)).nan_to_num(0)  # a block of zeros
        distance = (normed.double().unsqueeze(1) - dynamic_map.values.double()).abs()
        nearest = distance.argmin(1)
        if dynamic_map.values[0] == 0:
            nearest[(nearest == 0) & (normed > 0)] = 1  # ours: what is not zero does not become zero
        assert torch.equal(block_codes.long(), nearest)


@is_signed
@given(n=st.integers(1, 600), seed=st.integers(0, 999))
def test_the_error_is_half_a_spacing_and_decoded_values_are_stable(dynamic_map, n: int, seed: int) -> None:
    """Within the highest decade; 5 % of the value in the one below, and so on, down to the smallest value."""
    values = draw(n, seed, dynamic_map)
    codes, absmax = quantize_blockwise(values, dynamic_map)
    decoded = dequantize_blockwise(codes, absmax, dynamic_map)
    largest = absmax.repeat_interleave(BLOCK)[:n]
    bound = 0.501 * SPACING[bool(dynamic_map.values[0] < 0)] * largest
    assert ((decoded - values).abs() <= bound).all()
    assert (decoded[values == 0] == 0).all()
    if dynamic_map.values[0] == 0:
        assert (decoded[values > 1e-30] > 0).all()
    # The largest is a value of the map, unless it is negative: -1 is not.
    if (values[:BLOCK].max() == absmax[0]) and absmax[0] > 0:
        again = quantize_blockwise(decoded[:BLOCK], dynamic_map)
        assert torch.equal(again[0], codes[:BLOCK]) and torch.equal(again[1], absmax[:1])


def test_what_is_not_zero_does_not_become_zero_as_second_moment_only() -> None:
    values = torch.tensor([1.0, 1e-12, 0.0])
    assert quantize_blockwise(values, MAPS[1])[0].tolist() == [255, 1, 0]
    assert quantize_blockwise(values, MAPS[0])[0].tolist() == [255, 127, 127]


@pytest.mark.parametrize("tiny", [0.0, 2.0**-149, 2.0**-127])
def test_a_block_of_nothing_is_zero(tiny: float) -> None:
    for each in MAPS:
        codes, absmax = quantize_blockwise(torch.full((5,), tiny), each)
        decoded = dequantize_blockwise(codes, absmax, each)
        assert absmax == tiny and not decoded.any()
