"""fp32 in two halves. Oracles: fp32 itself, `Tensor.to` where it has no choice, and arithmetic in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minift.ops import halves
from minift.ops.halves import read_weights, write_weights_

EDGES = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x00800000, 0x3F808000, 0x3F818000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF,
         0x7F800000]  # fmt: skip
BITS = st.one_of(st.sampled_from(EDGES), st.integers(0, 0x7F800000))  # of what is not negative, up to infinity


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(halves, "_PIECE_ELEMENTS", 5)


def split(values):
    upper, lower = torch.empty(len(values), dtype=torch.bfloat16), torch.empty(len(values), dtype=torch.int16)
    write_weights_(upper, lower, values)
    return upper, lower


@given(bits=st.lists(st.tuples(BITS, st.booleans()), max_size=40))
def test_no_bit_is_lost_and_the_upper_half_is_nearest(bits):
    signed = [number - 2**31 if is_negative else number for number, is_negative in bits]
    values = torch.tensor(signed, dtype=torch.int32).view(torch.float32)
    upper, lower = split(values)
    assert torch.equal(read_weights(upper, lower).view(torch.int32), values.view(torch.int32))
    out = torch.empty(len(values))
    assert read_weights(upper, lower, out=out) is out
    assert torch.equal(out.view(torch.int32), values.view(torch.int32))

    to_even = values.bfloat16()  # as near, and the same but where there are two
    finite = values.isfinite() & to_even.isfinite() & upper.isfinite()
    error, least = ((half.double() - values.double()).abs() for half in (upper, to_even))
    assert torch.equal(error[finite], least[finite])
    ties = lower == -(2**15)
    assert torch.equal(upper[~ties], to_even[~ties])
    assert (upper[ties & finite].float().abs() > values[ties & finite].abs()).all()  # further from zero


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0x7FFF8000, -1])
def test_a_nan_stays_one_in_both(bits):
    values = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    upper, lower = split(values)
    assert upper.isnan().all() and read_weights(upper, lower).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_values_of_any_dtype(dtype):
    values = torch.randn(12, generator=torch.Generator().manual_seed(0)).to(dtype)
    upper, lower = split(values)
    assert torch.equal(read_weights(upper, lower), values.float())
    if dtype == torch.bfloat16:
        assert torch.equal(upper, values) and not lower.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_lower_half_there_is_one_tensor(dtype):
    master, values = torch.zeros(7, dtype=dtype), torch.randn(7)
    write_weights_(master, None, values)
    assert torch.equal(master, values.to(dtype))
    assert read_weights(master, None) is master
    out = torch.empty(7, dtype=dtype)
    assert read_weights(master, None, out=out) is out and torch.equal(out, master)
