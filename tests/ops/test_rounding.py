"""Stochastic rounding. Oracles: SplitMix64 in Python's integers, counting over all 2^16 random numbers, statistics."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from minift.ops.rounding import random_bits, round_stochastically_, splitmix64, stream_key

CPU = torch.device("cpu")
ALL_BITS = torch.arange(2**16, dtype=torch.int32)


def reference_splitmix64(key: int, count: int) -> list[int]:
    """`next()` of the generator as published, in integers that do not wrap around."""
    state, outputs = key % 2**64, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        outputs.append(z ^ (z >> 31))
    return outputs


def rounded(values: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    out = torch.empty(values.shape, dtype=torch.bfloat16)
    round_stochastically_(out, values, bits.clone())
    return out


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 30), st.integers(1, 30))
def test_is_splitmix64_from_any_place(key, first, count):
    ours = splitmix64(key, first, first + count, CPU)
    assert [word % 2**64 for word in ours.tolist()] == reference_splitmix64(key, first + count)[first:]


def test_known_outputs_of_splitmix64():
    """The first outputs for seed 1234567, as many implementations list them."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [word % 2**64 for word in splitmix64(1234567, 0, 3, CPU).tolist()] == known


@given(st.integers(0, 50), st.integers(1, 50))
def test_bits_belong_to_elements_wherever_one_starts(start, count):
    """The four lanes of the words, lowest first."""
    words = reference_splitmix64(7, 30)
    lanes = [word >> shift & 0xFFFF for word in words for shift in (0, 16, 32, 48)]
    assert random_bits(7, start, count, CPU).tolist() == lanes[start : start + count]


def test_keys_differ_by_seed_step_and_name():
    keys = {stream_key(s, t, n) for s in range(5) for t in range(100) for n in ("a", "b", "1a", "1 a")}
    assert len(keys) == 5 * 100 * 4
    assert all(-(2**63) <= key < 2**63 for key in keys)


# Signs, subnormals, and the largest power of two that still has a neighbour.
finite = st.floats(width=32, allow_nan=False, allow_infinity=False).filter(lambda x: abs(x) < 2.0**127)


@given(finite)
def test_over_all_random_numbers_the_mean_is_the_value_exactly(value):
    values = torch.full((2**16,), value)
    out = rounded(values, ALL_BITS).double()
    assert out.mean().item() == values[0].double().item()
    neighbours = out.unique().tolist()
    assert len(neighbours) <= 2
    towards_zero = (values[:1].view(torch.int32) & -(2**16)).view(torch.float32).item()
    assert neighbours == [value] or towards_zero in neighbours  # what bf16 represents stays; else these two


def test_what_is_not_finite_stays_not_finite():
    """Among the NaNs those whose bits, as integers, would run over into zero."""
    patterns = [0x7F800000, 0x7FC00000, 0x7FFFFFFF, 0x7F800001, -0x800000, -0x400000, -1]
    values = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)
    for bits in (0, 1, 2**15, 2**16 - 1):
        assert not rounded(values, torch.full((7,), bits, dtype=torch.int32)).isfinite().any()


def test_random_numbers_are_uniform_and_independent():
    """Six standard deviations: all of this is deterministic, and would fail once in 10^8 seeds if it were not."""
    n = 2**18
    streams = [random_bits(stream_key(s, t, name), 0, n, CPU) for s, t, name in [(0, 1, "w"), (1, 1, "w"), (0, 2, "w")]]
    streams.append(random_bits(stream_key(0, 1, "v"), 0, n, CPU))
    unit = [(stream.double() + 0.5) / 2**16 for stream in streams]
    for u in unit:
        assert abs(u.mean() - 0.5) < 6 * (1 / 12 / n) ** 0.5
        counts = torch.histc(u, 256, 0, 1)
        chi_squared = ((counts - n / 256) ** 2 / (n / 256)).sum()
        assert abs(chi_squared - 255) < 6 * (2 * 255) ** 0.5
        for bit in range(16):
            assert abs(((u * 2**16).long() >> bit & 1).double().mean() - 0.5) < 6 * 0.5 / n**0.5

    def correlation(a, b):
        return ((a - 0.5) * (b - 0.5)).mean() * 12

    for lag in (1, 2, 3, 4, 8, 64):
        assert abs(correlation(unit[0][lag:], unit[0][:-lag])) < 6 / (n - lag) ** 0.5
    for other in unit[1:]:
        assert abs(correlation(unit[0], other)) < 6 / n**0.5
