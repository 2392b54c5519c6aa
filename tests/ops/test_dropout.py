"""Dropout with a mask made from a seed: its values, its distribution, and that every kernel makes the same one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minift.ops import dropout as module
from minift.ops.dropout import DROPOUT_STEPS, draw_seed, dropout, dropout_steps

HAS_CUDA_KERNELS = True
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = ["contiguous", "slice of wider rows", "every second row", "slice of a fused projection", "transposed"]
SEEDS = st.integers(-(2**63), 2**63 - 1)
# The fixtures hold no state between examples.
property_test = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def bits_by_definition(seed: int, element: int) -> int:
    """SplitMix64 as in the paper, in Python's integers: 16 of the 64 bits of output element / 4."""
    z = (seed + (element // 4 + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    return z >> 16 * (element % 4) & 0xFFFF


@pytest.mark.parametrize("dtype", DTYPES)
@property_test
@given(
    shape=st.one_of(
        st.tuples(st.integers(0, 70)),
        st.tuples(st.integers(1, 5), st.integers(0, 70)),
        st.tuples(st.integers(1, 3), st.integers(100, 700).map(lambda packs: 8 * packs)),
        st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 40)),
    ),
    layout=st.sampled_from(LAYOUTS),
    seed=SEEDS,
    num_dropped=st.integers(0, DROPOUT_STEPS - 1),
)
def test_elements_are_kept_or_zero_by_the_definition(
    implementation, draw_tensor, dtype, shape, layout, seed, num_dropped
):
    """Bit for bit, in any layout."""
    if layout in ("every second row", "slice of a fused projection") and len(shape) == 1:
        layout = "contiguous"
    x = draw_tensor(torch.Generator().manual_seed(seed % 1000), shape, dtype, layout)
    y = (module.dropout_reference if implementation == "reference" else dropout)(x, seed, num_dropped)
    keep = torch.tensor([bits_by_definition(seed, e) >= num_dropped for e in range(x.numel())], dtype=torch.bool)
    assert y.dtype == dtype and y.is_contiguous()
    assert torch.equal(y, torch.where(keep.view(x.shape), x, 0.0))


def test_what_is_dropped_is_zero_even_if_it_was_not_finite(implementation):
    x = torch.tensor([torch.inf, torch.nan] * 200)
    y = (module.dropout_reference if implementation == "reference" else dropout)(x, 7, DROPOUT_STEPS // 2)
    assert set(y[y.isfinite()].tolist()) == {0.0} and 100 < y.isfinite().sum() < 300


@pytest.mark.parametrize("probability", [0.001, 0.05, 0.5, 0.9])
def test_distribution(probability):
    """Binomial in the whole, in each column and in each of the four places of a word; pairs of neighbours independent.

    Six standard deviations: all of this is deterministic, and would fail once in 10^8 seeds if it were not.
    """
    num_dropped = dropout_steps(probability)
    p = num_dropped / DROPOUT_STEPS
    for seed in (0, 1, -1, 2**40):
        dropped = dropout(torch.ones(4096, 64), seed, num_dropped) == 0

        def is_binomial(drops: torch.Tensor, p: float) -> bool:
            sigma = (p * (1 - p) / drops.shape[0]) ** 0.5
            return bool(((drops.double().mean(0) - p).abs() < 6 * sigma).all())

        assert is_binomial(dropped.view(-1), p) and is_binomial(dropped, p) and is_binomial(dropped.view(-1, 4), p)
        for lag in (1, 2, 3, 4, 64, 256):
            assert is_binomial((dropped.view(-1)[lag:] & dropped.view(-1)[:-lag])[:: 2 * lag + 1], p * p)


def test_number_of_drops_in_rows_is_binomial():
    """Chi-square of 16384 rows of 16 elements with p = 1/2 over the 17 possible numbers of drops."""
    drops = (dropout(torch.ones(16384, 16), 3, DROPOUT_STEPS // 2) == 0).sum(1)
    expected = torch.distributions.Binomial(16, torch.tensor(0.5)).log_prob(torch.arange(17.0)).exp() * 16384
    seen = torch.bincount(drops, minlength=17)
    merged = [
        (seen[low:high].sum(), expected[low:high].sum())
        for low, high in [(0, 4), *((i, i + 1) for i in range(4, 13)), (13, 17)]
    ]
    chi_square = sum((a - b) ** 2 / b for a, b in merged)
    assert chi_square < 29.6  # 0.1 % of the chi-square distribution with 10 degrees of freedom lies above


def test_seeds_give_different_masks():
    """Also neighbours, whose sequences begin a step of GAMMA apart only if their difference is one."""
    masks = torch.stack([dropout(torch.ones(10000), seed, DROPOUT_STEPS // 2) for seed in (0, 1, 2, -1, 2**63 - 1)])
    for first in range(5):
        for second in range(first):
            agreement = (masks[first] == masks[second]).double().mean().item()
            assert abs(agreement - 0.5) < 6 * 0.5 / 100


def test_seeds_follow_torchs_generator():
    torch.manual_seed(5)
    first = [draw_seed() for _ in range(3)]
    torch.manual_seed(5)
    assert [draw_seed() for _ in range(3)] == first and len(set(first)) == 3
    assert all(-(2**63) <= seed < 2**63 for seed in first)


def test_steps_are_the_nearest_and_never_all():
    assert [dropout_steps(p) for p in (0.0, 0.5, 1 / 2**16, 0.4 / 2**16, 1 - 2**-20)] == [0, 32768, 1, 0, 65535]


def test_many_threads_make_the_same_mask(instruction_set, in_threads):
    x = torch.ones(301, 1031)
    one, two, three = in_threads(lambda: dropout(x, 11, 9000))
    assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_opcheck(instruction_set, draw_tensor, dtype):
    x = draw_tensor(torch.Generator().manual_seed(0), (3, 20), dtype, "slice of wider rows")
    torch.library.opcheck(torch.ops.minift.dropout.default, (x, 5, 20000))
