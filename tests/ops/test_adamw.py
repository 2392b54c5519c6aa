"""The fused AdamW update. Oracles: the formula in fp64; `rounding.py` for bf16 masters; fp32 masters for those in
halves.

Tolerances, with u = 2^-24: m is the sum of two terms with at most 3 roundings each (4 with the gradient's factor),
v likewise of two positive terms; the quotient adds 4 roundings and half of v's, the weight 3 of its own terms.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minift.ops import adamw as module
from minift.ops.adamw import AdamWStep, Weights, adamw_
from minift.ops.halves import read_weights, write_weights_
from minift.ops.rounding import random_bits, round_stochastically_

HAS_CUDA_KERNELS = True
U = 2.0**-24
STEP = AdamWStep(beta1=0.9, beta2=0.95, eps=1e-6, step_size=2e-3, keep=1.0 - 3e-4, key=-(2**60) + 7)
MASTERS = [torch.float32, torch.bfloat16]
BF16 = {"master": torch.zeros(8, dtype=torch.bfloat16)}
SIZES = st.one_of(st.integers(0, 40), st.integers(200, 300))
# The fixtures hold no state between examples.
property_test = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that the reference has more than one, and a last one that is shorter."""
    monkeypatch.setitem(module.BLOCK_ELEMENTS, "cpu", 48)


def draw(n, seed, master_dtype):
    """master, grad, exp_avg, exp_avg_sq: gradients of very different magnitudes, moments as they may have left them."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-6, 3, (n,), generator=generator)
    master, grad, exp_avg = torch.randn(3, n, generator=generator)
    exp_avg_sq = torch.rand(n, generator=generator) * scale**2
    return master.to(master_dtype), grad * scale, exp_avg * scale, exp_avg_sq


def placed(tensor, offset):
    """A copy that begins `offset` elements behind an aligned address, and the memory in which it is."""
    memory = torch.cat([tensor.new_full((offset,), 7), tensor, tensor.new_full((4,), 7)])
    return memory[offset : offset + len(tensor)], memory


def update(implementation, tensors, factor=None, step=STEP, first=0, lower=None, offsets=(0, 0, 0, 0)):
    """The new master, exp_avg and exp_avg_sq; nothing beside them changes."""
    pairs = [placed(tensor, offset) for tensor, offset in zip(tensors, offsets, strict=True)]
    master, grad, exp_avg, exp_avg_sq = (view for view, _ in pairs)
    if implementation == "reference":
        module.adamw_reference(master, grad, exp_avg, exp_avg_sq, lower, factor, *step, first)
    else:
        adamw_(Weights(master, grad, first, lower), exp_avg, exp_avg_sq, factor, step)
    assert torch.equal(grad.view(torch.int32), tensors[1].view(torch.int32))
    for (_, memory), offset in zip(pairs, offsets, strict=True):
        assert (memory[:offset] == 7).all() and (memory[-4:] == 7).all()
    return master, exp_avg, exp_avg_sq


@property_test
@given(n=SIZES, seed=st.integers(0, 999), factor=st.sampled_from([None, 1.0, 2.0**-14, 0.37]))
def test_the_update_is_the_formula(implementation, n, seed, factor):
    tensors = draw(n, seed, torch.float32)
    given_factor = None if factor is None else torch.tensor(factor)
    master, exp_avg, exp_avg_sq = update(implementation, tensors, given_factor)

    w, g, m, v = (tensor.double() for tensor in tensors)
    g = g * (1.0 if factor is None else given_factor.double())
    m_terms = STEP.beta1 * m.abs() + (1 - STEP.beta1) * g.abs()
    m, v = STEP.beta1 * m + (1 - STEP.beta1) * g, STEP.beta2 * v + (1 - STEP.beta2) * g * g
    # torch's lerp subtracts first: two more roundings, of at most |g| + |m|, times 1 - beta1.
    m_error = (4 * m_terms + 2 * (1 - STEP.beta1) * (tensors[2].abs() + g.abs())) * U
    assert ((exp_avg.double() - m).abs() <= m_error).all()
    assert ((exp_avg_sq.double() - v).abs() <= 6 * U * v).all()
    denominator = v.sqrt() + STEP.eps
    change = STEP.step_size * m / denominator
    exact = STEP.keep * w - change
    error = STEP.step_size * m_error / denominator + 8 * U * change.abs() + 3 * U * (w.abs() + exact.abs())
    assert ((master.double() - exact).abs() <= error).all()


@pytest.mark.parametrize("master_dtype", MASTERS)
@property_test
@given(n=SIZES, seed=st.integers(0, 999), first=st.integers(0, 70), data=st.data())
def test_where_it_is_cut_changes_no_bit(implementation, master_dtype, n, seed, first, data):
    tensors = draw(n, seed, master_dtype)
    cut = data.draw(st.integers(0, n))
    whole = update(implementation, tensors, first=first)
    left = update(implementation, [tensor[:cut] for tensor in tensors], first=first)
    right = update(implementation, [tensor[cut:] for tensor in tensors], first=first + cut)
    for one, *two in zip(whole, left, right, strict=True):
        assert torch.equal(one, torch.cat(two))


@pytest.mark.parametrize("master_dtype", MASTERS)
@property_test
@given(n=SIZES, seed=st.integers(0, 999), offsets=st.tuples(*[st.sampled_from([0, 0, 0, 1, 2])] * 4))
def test_where_memory_begins_changes_no_bit(implementation, master_dtype, n, seed, offsets):
    tensors = draw(n, seed, master_dtype)
    moved = update(implementation, tensors, offsets=offsets)
    for ours, expected in zip(moved, update(implementation, tensors), strict=True):
        assert torch.equal(ours, expected)


@property_test
@given(n=SIZES, seed=st.integers(0, 999), first=st.integers(0, 70))
def test_bf16_masters_are_rounded_by_the_random_bits_of_their_elements(implementation, n, seed, first):
    """Without a gradient the new weight is one product, which has one fp32 value everywhere."""
    master = draw(n, seed, torch.bfloat16)[0]
    zeros = torch.zeros(n)
    actual, _, _ = update(implementation, (master, zeros, zeros, zeros), first=first)
    expected = torch.empty_like(master)
    round_stochastically_(expected, master.float() * STEP.keep, random_bits(STEP.key, first, n, master.device))
    assert torch.equal(actual, expected)


@property_test
@given(seed=st.integers(0, 999))
def test_a_bf16_master_is_one_of_the_two_neighbours_of_the_fp32_update(implementation, seed):
    tensors = draw(300, seed, torch.bfloat16)
    narrow, exp_avg, exp_avg_sq = update(implementation, tensors)
    wide, *moments = update(implementation, (tensors[0].float(), *tensors[1:]))
    assert torch.equal(exp_avg, moments[0]) and torch.equal(exp_avg_sq, moments[1])
    towards_zero = (wide.view(torch.int32) & -(2**16)).view(torch.float32)
    away = (towards_zero.view(torch.int32) + 2**16).view(torch.float32)
    down, up = narrow.float() == towards_zero, narrow.float() == away
    assert (down | (up & (wide != towards_zero))).all() and down.any() and up.any()


@property_test
@given(n=SIZES, seed=st.integers(0, 999), offsets=st.tuples(*[st.sampled_from([0, 0, 1, 2])] * 2))
def test_in_halves_weights_are_updated_to_the_same_bits(implementation, n, seed, offsets):
    """Of numbers up to fp32's largest and down to subnormals, wherever either half is. So are the moments."""
    master, grad, exp_avg, exp_avg_sq = draw(n, seed, torch.float32)
    scale = 10.0 ** torch.randint(-44, 39, (n,), generator=torch.Generator().manual_seed(seed))
    master = master * scale
    expected_master, *expected = update(implementation, (master, grad, exp_avg, exp_avg_sq))
    lower = torch.full((offsets[0] + n + 2,), 7, dtype=torch.int16)
    upper, here = torch.empty(n, dtype=torch.bfloat16), lower[offsets[0] : offsets[0] + n]
    write_weights_(upper, here, master)
    tensors = upper, grad, exp_avg, exp_avg_sq
    new_upper, *moments = update(implementation, tensors, lower=here, offsets=(offsets[1], 0, 0, 0))
    assert torch.equal(read_weights(new_upper, here).view(torch.int32), expected_master.view(torch.int32))
    for ours, theirs in zip(moments, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert (lower[: offsets[0]] == 7).all() and (lower[-2:] == 7).all()


def test_nans_and_infinities_in_halves(implementation):
    """They are such in the upper half, with which compute goes on, too."""
    master = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf, 3.4e38, 1.0])
    master.view(torch.int32)[1] = 2**31 - 1  # what a GPU makes of 0/0: rounding to nearest would carry it to -0
    upper, lower = torch.empty(6, dtype=torch.bfloat16), torch.empty(6, dtype=torch.int16)
    write_weights_(upper, lower, master)
    grad, zeros = torch.zeros(6), torch.zeros(6)
    grad.view(torch.int32)[0] = 2**31 - 1
    new, _, _ = update(implementation, (upper, grad, zeros, zeros), lower=lower)
    assert new.isnan().tolist() == [True, True, False, False, False, False]
    assert new.isinf().tolist() == [False, False, True, True, True, False]  # 3.4e38 is beyond bf16's largest
    weights = read_weights(new, lower)
    assert weights.isnan().tolist() == [True, True, False, False, False, False]
    assert weights[4].item() == torch.tensor(3.4e38).mul(STEP.keep).item()


def any_bits(n, dtype, seed):
    """(n,): zeros of both signs, subnormals, infinities, NaNs with payloads."""
    numbers = torch.randint(0, 256, (n, dtype.itemsize), generator=torch.Generator().manual_seed(seed))
    some = numbers.to(torch.uint8).view(dtype).flatten()
    return torch.where(numbers[:, 0] % 4 == 0, torch.tensor(-0.0).to(dtype), some)


@pytest.mark.parametrize("master_dtype", MASTERS)
@property_test
@given(
    n=SIZES,
    seed=st.integers(0, 999),
    factor=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    in_halves=st.booleans(),
    offsets=st.tuples(*[st.sampled_from([0, 0, 0, 1, 2])] * 4),
)
def test_nothing_is_written_with_a_factor_that_is_not_finite(
    implementation, master_dtype, n, seed, factor, in_halves, offsets
):
    tensors = [any_bits(n, dtype, seed + at) for at, dtype in enumerate([master_dtype, *[torch.float32] * 3])]
    lower = any_bits(n, torch.int16, seed) if in_halves and master_dtype == torch.bfloat16 else None
    lower_before = None if lower is None else lower.clone()
    after = update(implementation, tensors, torch.tensor(factor), lower=lower, offsets=offsets)
    for ours, before in zip(after, (tensors[0], *tensors[2:]), strict=True):
        assert torch.equal(ours.view(torch.uint8), before.view(torch.uint8))
    assert lower is None or torch.equal(lower, lower_before)


@pytest.mark.parametrize("master_dtype", MASTERS)
def test_a_non_finite_gradient_shows(implementation, master_dtype):
    """Nothing hides it. An infinite weight is stored as NaN in bf16, see `round_stochastically_`."""
    master, grad, exp_avg, exp_avg_sq = draw(40, 0, master_dtype)
    grad[3], grad[39] = torch.nan, torch.inf
    new = update(implementation, (master, grad, exp_avg, exp_avg_sq))
    bad = torch.zeros(40, dtype=torch.bool).index_fill(0, torch.tensor([3, 39]), True)
    for tensor in new:
        assert torch.equal(~tensor.isfinite(), bad)
    master[7] = torch.inf
    new_master, *_ = update(implementation, (master, grad, exp_avg, exp_avg_sq))
    assert new_master[7].isnan() if master_dtype == torch.bfloat16 else new_master[7].isinf()


def test_many_threads_give_the_same_bits(instruction_set, in_threads):
    tensors = draw(200_003, 0, torch.bfloat16)
    for one, two, three in zip(*in_threads(lambda: update(instruction_set, tensors)), strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize("master_dtype, in_halves", [(torch.float32, 0), (torch.bfloat16, 0), (torch.bfloat16, 1)])
@pytest.mark.parametrize("factor", [None, torch.tensor(0.5)])
def test_opcheck(instruction_set, master_dtype, in_halves, factor):
    tensors = draw(20, 0, master_dtype)
    lower = torch.zeros(20, dtype=torch.int16) if in_halves else None
    arguments = (*tensors, lower, factor, 0.9, 0.95, 1e-6, 1e-3, 0.999, 5, 0)
    torch.library.opcheck(torch.ops.minift.adamw.default, arguments)


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda t: t.update(master=torch.zeros(8, dtype=torch.float16)), "master must be"),
        (lambda t: t.update(grad=torch.zeros(7)), "grad must be"),
        (lambda t: t.update(exp_avg=torch.zeros(8, dtype=torch.bfloat16)), "exp_avg must"),
        (lambda t: t.update(exp_avg_sq=torch.zeros(16)[::2]), "moments must be contiguous"),
        (lambda t: t.update(grad_factor=torch.ones(2)), "grad_factor must be"),
        (lambda t: t.update(BF16, lower=torch.zeros(7, dtype=torch.int16)), "lower must be"),
        (lambda t: t.update(BF16, lower=torch.zeros(16, dtype=torch.int16)[::2]), "lower must be"),
        (lambda t: t.update(BF16, lower=torch.zeros(8, dtype=torch.int32)), "lower must be"),
        (lambda t: t.update(lower=torch.zeros(8, dtype=torch.int16)), "lower must be"),
    ],
)
def test_what_the_kernel_cannot_read_is_refused(instruction_set, spoil, complaint):
    t = {name: torch.zeros(8) for name in ("master", "grad", "exp_avg", "exp_avg_sq")}
    t |= {"grad_factor": None, "lower": None}
    spoil(t)
    with pytest.raises(RuntimeError, match=complaint):
        adamw_(Weights(t["master"], t["grad"], 0, t["lower"]), t["exp_avg"], t["exp_avg_sq"], t["grad_factor"], STEP)
