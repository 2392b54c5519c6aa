"""Figures of one weight. Oracles: planted singular vectors, torch's SVD, closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minift.analysis.spectrum import analyze_weight, effective_rank, find_intruders, svd

SHAPES = st.sampled_from([(24, 24), (20, 48), (48, 20)])


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    values = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(values)[0]


def weight_with(S: torch.Tensor, shape, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W of these singular values, and its U and V."""
    U, V = orthonormal(shape[0], len(S), seed), orthonormal(shape[1], len(S), seed + 1)
    return (U * S) @ V.t(), U, V


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**30), count=st.integers(0, 4))
def test_planted_intruders_are_found_and_nothing_else(shape, seed, count):
    """W lacks some directions; along those, updates far larger than W make intruders, of the σ that was planted."""
    S = torch.linspace(2.0, 1.0, 14, dtype=torch.float64)
    before, U, V = weight_with(S, shape, seed)
    new_U = torch.linalg.qr(torch.cat([U, orthonormal(shape[0], 6, seed + 2)], 1))[0][:, 14 : 14 + count]
    new_V = torch.linalg.qr(torch.cat([V, orthonormal(shape[1], 6, seed + 3)], 1))[0][:, 14 : 14 + count]
    planted = torch.tensor([9.0, 7.0, 5.0, 3.0], dtype=torch.float64)[:count]
    enlarged = 4.0 * torch.outer(U[:, 2], V[:, 2])  # a direction that W has is no intruder, however much it grows
    after = before + (new_U * planted) @ new_V.t() + enlarged
    intruders = find_intruders(before, after, top=8)
    assert [intruder.singular_value for intruder in intruders.found] == pytest.approx(planted.tolist(), rel=1e-7)
    assert all(max(intruder.similarity, intruder.base_share) < 1e-6 for intruder in intruders.found)
    part = intruders.columns @ intruders.rows
    torch.testing.assert_close(part, (new_U * planted) @ new_V.t(), rtol=0, atol=1e-6)
    assert not find_intruders(before, after - part, top=8).found, "none is left when they are taken away"


@settings(max_examples=20, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**30))
def test_the_base_has_none(shape, seed):
    """Neither itself, nor rounded to bf16 or scaled."""
    before = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for after in (before, 1.5 * before, before.float()):
        assert find_intruders(before, after).found == ()
    separated, _, _ = weight_with(1.6 ** -torch.arange(12.0, dtype=torch.float64), shape, seed)
    assert find_intruders(separated, separated.bfloat16(), top=5).found == ()


def test_the_threshold_is_a_cosine():
    """An update turns the first singular vector by 60 degrees: cosine 0.5 with the old one, √3/2 with another."""
    before, after = torch.diag(torch.tensor([2.0, 1.0, 0.5])), torch.zeros(3, 3)
    after[:, 0] = 10.0 * torch.tensor([0.5, math.sqrt(3) / 2, 0.0])
    assert not find_intruders(before, after, top=1, threshold=0.86).found
    (found,) = find_intruders(before, after, top=1, threshold=0.87).found
    assert found.similarity == pytest.approx(math.sqrt(3) / 2, abs=1e-6) and found.index == 0
    assert found.base_share == pytest.approx(math.hypot(0.5 * 2.0, math.sqrt(3) / 2) / 10.0)  # u · W over σ
    for top, threshold in ((0, 0.5), (1, 0.0), (1, 1.1)):
        with pytest.raises(ValueError, match="valid: 1 or more, and above 0 up to 1"):
            find_intruders(before, after, top, threshold)


@settings(max_examples=20, deadline=None)
@given(shape=SHAPES, rank=st.integers(0, 20), seed=st.integers(0, 2**30))
def test_svd_is_torch_s(shape, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(rank, size, dtype=torch.float64, generator=generator) for size in shape)
    matrix = A.t() @ B
    U, S, V = svd(matrix)
    torch.testing.assert_close(S, torch.linalg.svdvals(matrix), rtol=0, atol=2e-7 * float(S.max() + 1e-30))
    torch.testing.assert_close((U * S) @ V.t(), matrix, rtol=0, atol=2e-7 * float(S.max() + 1e-30))
    held = int((S > 0).sum())
    for vectors in (U, V):
        gram = vectors.t() @ vectors
        torch.testing.assert_close(gram[:held, :held], torch.eye(held, dtype=torch.float64), rtol=0, atol=1e-5)
        assert not gram[held:].any()


def test_effective_rank_counts_equal_values():
    assert effective_rank(torch.zeros(4)) == 0.0
    for count in (1, 3, 8):
        assert effective_rank(torch.tensor([0.3] * count + [0.0] * 2, dtype=torch.float64)) == pytest.approx(count)
    p = torch.tensor([0.7, 0.3])
    assert effective_rank(5.0 * p) == pytest.approx(0.7**-0.7 * 0.3**-0.3)


@settings(max_examples=20, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**30), gain=st.floats(0.1, 5.0))
def test_amplification_is_that_of_planted_directions(shape, seed, gain):
    """ΔW = gain · σ u vᵀ along one of W's own directions: ‖ΔW‖ over ‖W‖ there is the gain; outside of W, infinite."""
    S = torch.linspace(2.0, 1.0, 10, dtype=torch.float64)
    before, U, V = weight_with(S, shape, seed)
    after = before + gain * S[4] * torch.outer(U[:, 4], V[:, 4])
    analysis = analyze_weight("w", before, after, ())
    assert analysis.amplification == pytest.approx(gain, rel=1e-6)
    assert analysis.effective_rank == pytest.approx(1.0, rel=1e-6)
    assert analysis.update_ratio == pytest.approx(gain * S[4].item() / S.norm().item(), rel=1e-9)
    unchanged = analyze_weight("w", before, before, ())
    assert unchanged.amplification == unchanged.effective_rank == unchanged.update_ratio == 0.0
    block = torch.zeros(4, 4)
    block[0, 0], other = 1.0, torch.zeros(4, 4)
    other[1, 1] = 1.0
    assert analyze_weight("w", block, block + other, ()).amplification == math.inf


def test_magnitude_and_direction_are_of_rows():
    before = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    longer = analyze_weight("w", before, before * torch.tensor([[2.0], [0.5]]), ())
    assert longer.magnitude_change == pytest.approx((5.0 + 1.0) / 2) and longer.direction_change == pytest.approx(0.0)
    turned = analyze_weight("w", before, torch.tensor([[-4.0, 3.0], [0.0, -2.0]]), ())
    assert turned.magnitude_change == 0.0 and turned.direction_change == pytest.approx((1.0 + 2.0) / 2)
