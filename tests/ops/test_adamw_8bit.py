"""The fused AdamW update with 8-bit moments. Oracle: `adamw_` on the dequantised moments, `blockwise` for what is kept.

`adamw_reference` and the kernels round differently in the last bits, and where a moment lies within these bits of a
border between two codes its code is the neighbour.
"""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minift.ops import adamw, adamw_8bit
from minift.ops.adamw import AdamWStep, Weights, adamw_
from minift.ops.adamw_8bit import QuantizedMoments, adamw_8bit_
from minift.ops.blockwise import BLOCK, dequantize_blockwise, dynamic_map, quantize_blockwise
from minift.ops.halves import read_weights, write_weights_
from tests.ops.test_adamw import any_bits

HAS_CUDA_KERNELS = True
U = 2.0**-24
SIGNED, UNSIGNED = dynamic_map(signed=True), dynamic_map(signed=False)
STEP = AdamWStep(beta1=0.9, beta2=0.95, eps=1e-6, step_size=2e-3, keep=1.0 - 3e-4, key=-(2**60) + 7)
FORGETFUL = AdamWStep(beta1=0.0, beta2=0.0, eps=1e-6, step_size=0.0, keep=1.0, key=0)
MASTERS = [torch.float32, torch.bfloat16]
SIZES = st.one_of(st.integers(0, 40), st.integers(240, 900), st.sampled_from([256, 512, 768]))
# The fixtures hold no state between examples.
property_test = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So that the reference has more than one."""
    monkeypatch.setitem(adamw.BLOCK_ELEMENTS, "cpu", 2 * BLOCK)


def draw(n, seed, master_dtype=torch.float32):
    """master, grad, and moments as an update may have left them."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-6, 3, (n,), generator=generator)
    master, grad, exp_avg = torch.randn(3, n, generator=generator)
    exp_avg_sq = torch.rand(n, generator=generator) * scale**2
    moments = (*quantize_blockwise(exp_avg * scale, SIGNED), *quantize_blockwise(exp_avg_sq, UNSIGNED))
    return master.to(master_dtype), grad * scale, QuantizedMoments(*moments)


def tensors_of(moments):
    return [getattr(moments, field.name) for field in fields(moments)]


def decoded(moments):
    return (
        dequantize_blockwise(moments.exp_avg_codes, moments.exp_avg_absmax, SIGNED),
        dequantize_blockwise(moments.exp_avg_sq_codes, moments.exp_avg_sq_absmax, UNSIGNED),
    )


def update(implementation, master, grad, moments, factor=None, step=STEP, first=0, lower=None, offsets=(0,) * 5):
    """The new master and moments, so many elements behind aligned addresses; nothing beside them changes."""
    tensors = [master, *tensors_of(moments)]
    memories = [
        torch.cat([tensor.new_full((offset,), 7), tensor, tensor.new_full((4,), 7)])
        for tensor, offset in zip(tensors, offsets, strict=True)
    ]
    master, *copies = (memory[offset:-4] for memory, offset in zip(memories, offsets, strict=True))
    moments = QuantizedMoments(*copies)
    if implementation == "reference":
        maps = (SIGNED.values, SIGNED.buckets, UNSIGNED.values, UNSIGNED.buckets)
        constants = (*step, first)
        adamw_8bit.adamw_8bit_reference(master, grad, *tensors_of(moments), *maps, lower, factor, *constants)
    else:
        adamw_8bit_(Weights(master, grad, first, lower), moments, SIGNED, UNSIGNED, factor, step)
    for memory, offset in zip(memories, offsets, strict=True):
        assert (memory[:offset] == 7).all() and (memory[-4:] == 7).all()
    return master, moments


@property_test
@given(seed=st.integers(0, 999), n=SIZES)
def test_moments_are_quantised_exactly(implementation, seed, n):
    """With betas of zero the moments are g and g^2: the codes are those of `quantize_blockwise`, all of them."""
    master, grad, moments = draw(n, seed)
    _, after = update(implementation, master, grad, moments, step=FORGETFUL)
    expected = (*quantize_blockwise(grad, SIGNED), *quantize_blockwise(grad * grad, UNSIGNED))
    for ours, theirs in zip(tensors_of(after), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("tiny", [0.0, 2.0**-149, 2.0**-127, 2.0**-126, 2.0**-63])
def test_blocks_of_nothing_are_quantised_exactly(implementation, tiny):
    """Zeros, and numbers whose inverse, or that of whose square, is infinite: a full block, and one that ends early."""
    grad = torch.full((300,), tiny)
    grad[::2] *= -1.0
    master, _, moments = draw(300, 0)
    _, after = update(implementation, master, grad, moments, step=FORGETFUL)
    expected = (*quantize_blockwise(grad, SIGNED), *quantize_blockwise(grad * grad, UNSIGNED))
    for ours, theirs in zip(tensors_of(after), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dynamic_map", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
def test_every_border_between_codes(implementation, dynamic_map):
    """The floats around each of the 255 borders, from below and above zero, and 10^5 values of every magnitude."""
    borders = dynamic_map.borders
    around = [borders]
    for end in (-2.0, 2.0):
        step = borders
        for _ in range(2):
            step = torch.nextafter(step, torch.tensor(end))
            around.append(step)
    generator = torch.Generator().manual_seed(0)
    magnitudes = 10.0 ** (-9 * torch.rand(100_000, generator=generator))
    values = torch.cat([*around, magnitudes, -magnitudes, torch.tensor([0.0, -0.0])])
    blocks = torch.nn.functional.pad(values, (0, -len(values) % (BLOCK - 1))).view(-1, BLOCK - 1)
    values = torch.nn.functional.pad(blocks, (1, 0), value=1.0).flatten()  # absmax 1: normed values are the values
    if dynamic_map is UNSIGNED:
        values = values.clamp(min=0.0).sqrt()
    master, _, moments = draw(len(values), 0)
    _, after = update(implementation, master, values, moments, step=FORGETFUL)
    if dynamic_map is UNSIGNED:
        assert torch.equal(after.exp_avg_sq_codes, quantize_blockwise(values * values, UNSIGNED)[0])
    else:
        assert torch.equal(after.exp_avg_codes, quantize_blockwise(values, SIGNED)[0])


@pytest.mark.parametrize("master_dtype", MASTERS)
@property_test
@given(n=SIZES.filter(bool), seed=st.integers(0, 999), factor=st.sampled_from([None, torch.tensor(0.37)]))
def test_weights_are_updated_from_the_decoded_moments(implementation, master_dtype, n, seed, factor):
    """As `adamw_` does it, which is tested; the same operations, so the same bits on the same processor."""
    master, grad, moments = draw(n, seed, master_dtype)
    new_master, after = update(implementation, master, grad, moments, factor)
    exp_avg, exp_avg_sq = decoded(moments)
    if implementation == "reference":
        adamw.adamw_reference(master, grad, exp_avg, exp_avg_sq, None, factor, *STEP, 0)
    else:
        adamw_(Weights(master, grad), exp_avg, exp_avg_sq, factor, STEP)
    assert torch.equal(new_master, master)
    for ours, exact, bound in zip(decoded(after), (exp_avg, exp_avg_sq), (0.9 / 64, 0.9 / 128), strict=True):
        for ours_block, block in zip(ours.split(BLOCK), exact.split(BLOCK), strict=True):
            assert ((ours_block - block).abs() <= 0.501 * bound * block.abs().max(0, keepdim=True)[0]).all()


@property_test
@given(n=SIZES, seed=st.integers(0, 999), offsets=st.tuples(*[st.sampled_from([0, 0, 0, 1, 2])] * 5))
def test_in_halves_weights_are_updated_to_the_same_bits(implementation, n, seed, offsets):
    """So are the moments; and both, wherever they are."""
    master, grad, moments = draw(n, seed)
    expected_master, expected = update(implementation, master, grad, moments, first=3)
    upper, lower = torch.empty(n, dtype=torch.bfloat16), torch.full((n + 2,), 7, dtype=torch.int16)
    write_weights_(upper, lower[1:-1], master)
    upper, after = update(implementation, upper, grad, moments, first=3, lower=lower[1:-1], offsets=offsets)
    assert torch.equal(read_weights(upper, lower[1:-1]), expected_master)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(after), tensors_of(expected), strict=True))
    assert lower[0] == lower[-1] == 7


@pytest.mark.parametrize("master_dtype", MASTERS)
@property_test
@given(n=SIZES, seed=st.integers(0, 999), data=st.data())
def test_where_it_is_cut_between_blocks_changes_no_bit(implementation, master_dtype, n, seed, data):
    master, grad, moments = draw(n, seed, master_dtype)
    cut = data.draw(st.integers(0, n // BLOCK))
    element = cut * BLOCK
    whole_master, whole = update(implementation, master, grad, moments, first=512)
    parts = []
    for here, blocks in ((slice(0, element), slice(0, cut)), (slice(element, n), slice(cut, None))):
        codes, absmax, codes_sq, absmax_sq = tensors_of(moments)
        part = QuantizedMoments(codes[here], absmax[blocks], codes_sq[here], absmax_sq[blocks])
        parts.append(update(implementation, master[here], grad[here], part, first=512 + here.start))
    assert torch.equal(whole_master, torch.cat([part_master for part_master, _ in parts]))
    for one, *two in zip(tensors_of(whole), *(tensors_of(part) for _, part in parts), strict=True):
        assert torch.equal(one, torch.cat(two))


@pytest.mark.parametrize("master_dtype", MASTERS)
@property_test
@given(
    n=SIZES,
    seed=st.integers(0, 999),
    factor=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    in_halves=st.booleans(),
    offsets=st.tuples(*[st.sampled_from([0, 0, 0, 1, 2])] * 5),
)
def test_nothing_is_written_with_a_factor_that_is_not_finite(
    implementation, master_dtype, n, seed, factor, in_halves, offsets
):
    blocks = -(-n // BLOCK)
    kinds = [(n, torch.uint8), (blocks, torch.float32)] * 2
    moments = QuantizedMoments(*(any_bits(size, dtype, seed + at) for at, (size, dtype) in enumerate(kinds)))
    master, grad = any_bits(n, master_dtype, seed + 4), any_bits(n, torch.float32, seed + 5)
    lower = any_bits(n, torch.int16, seed) if in_halves and master_dtype == torch.bfloat16 else None
    lower_before = None if lower is None else lower.clone()
    options = {"lower": lower, "offsets": offsets}
    new_master, after = update(implementation, master, grad, moments, torch.tensor(factor), **options)
    for ours, before in zip((new_master, *tensors_of(after)), (master, *tensors_of(moments)), strict=True):
        assert torch.equal(ours.view(torch.uint8), before.view(torch.uint8))
    assert lower is None or torch.equal(lower, lower_before)


def test_padding_stays_zero(implementation):
    """Weights and gradients of zero beside others in one block, and blocks of nothing else."""
    master, grad, moments = torch.zeros(700), torch.zeros(700), QuantizedMoments(*tensors_of(draw(700, 0)[2]))
    for tensor in tensors_of(moments):
        tensor.zero_()
    master[:41] = grad[:41] = 1.0
    for _ in range(3):
        master, moments = update(implementation, master, grad, moments)
    assert not master[41:].any() and (master[:41] < 1.0).all()
    assert all(not values[41:].any() for values in decoded(moments))


def test_a_non_finite_gradient_shows(implementation):
    master, grad, moments = draw(600, 0)
    grad[3], grad[599] = torch.nan, torch.inf
    new_master, _ = update(implementation, master, grad, moments)
    assert new_master.isnan().nonzero().flatten().tolist() == [3, 599]
    assert new_master.isinf().sum() == 0


def test_a_nan_stays_in_its_block(implementation):
    """The reference spoils the block, the kernels the element (next test); nobody what is beside the block."""
    master, grad, moments = draw(600, 0)
    expected_master, expected = update(implementation, master, grad, moments)
    grad[3] = torch.nan
    new_master, after = update(implementation, master, grad, moments)
    assert torch.equal(new_master[256:], expected_master[256:])
    for name in ("exp_avg_codes", "exp_avg_sq_codes"):
        assert torch.equal(getattr(after, name)[256:], getattr(expected, name)[256:])
    for name in ("exp_avg_absmax", "exp_avg_sq_absmax"):
        assert torch.equal(getattr(after, name)[1:], getattr(expected, name)[1:])


def test_a_nan_has_the_code_of_what_is_largest(compiled):
    """It must not look beyond the table. Other elements of its block are what they would be without it."""
    master, grad, moments = draw(600, 0)
    grad[[3, 598]] = 0.0
    _, without = update(compiled, master, grad, moments, step=FORGETFUL)
    grad[[3, 598]] = torch.nan
    _, after = update(compiled, master, grad, moments, step=FORGETFUL)
    expected = without.exp_avg_codes.clone()
    expected[[3, 598]] = 255
    assert torch.equal(after.exp_avg_codes, expected)
    assert torch.equal(after.exp_avg_absmax, without.exp_avg_absmax)


def test_many_threads_give_the_same_bits(instruction_set, in_threads):
    arguments = draw(300_003, 0, torch.bfloat16)
    results = [[master, *tensors_of(m)] for master, m in in_threads(lambda: update(instruction_set, *arguments))]
    for one, two, three in zip(*results, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize("master_dtype", MASTERS)
def test_opcheck(instruction_set, master_dtype):
    master, grad, moments = draw(300, 0, master_dtype)
    maps = (SIGNED.values, SIGNED.buckets, UNSIGNED.values, UNSIGNED.buckets)
    for lower in (None, torch.zeros(300, dtype=torch.int16))[: 1 + (master_dtype == torch.bfloat16)]:
        arguments = (master, grad, *tensors_of(moments), *maps, lower, None, 0.9, 0.95, 1e-6, 1e-3, 0.999, 5, 0)
        torch.library.opcheck(torch.ops.minift.adamw_8bit.default, arguments)


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda a: a.update(exp_avg_codes=torch.zeros(299, dtype=torch.uint8)), "codes must be"),
        (lambda a: a.update(exp_avg_sq_codes=torch.zeros(300)), "codes must be"),
        (lambda a: a.update(exp_avg_absmax=torch.zeros(1)), "absmax must be"),
    ],
)
def test_what_the_kernel_cannot_read_is_refused(instruction_set, spoil, complaint):
    master, grad, moments = draw(300, 0)
    named = {field.name: getattr(moments, field.name) for field in fields(moments)}
    spoil(named)
    with pytest.raises(RuntimeError, match=complaint):
        adamw_8bit_(Weights(master, grad), QuantizedMoments(**named), SIGNED, UNSIGNED, None, STEP)
