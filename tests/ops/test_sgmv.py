"""sgmv_ against the formula in fp64, adapter by adapter.

Tolerance: h = x Aᵀ is a sum of `in` products in fp32, y a sum of rank + 1 of them: (in + rank + 2) u32 of the sum of
absolute values, u32 = 2⁻²⁴, and one rounding to the dtype (conftest.py's `rounding`).
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minift.ops.sgmv import sgmv_, sgmv_reference
from tests.cuda_on_cpu import library as cuda_on_cpu

HAS_CUDA_KERNELS = True
U32 = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "slice of wider rows", "every second row"]
# The fixtures hold no state between examples.
property_test = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def int32(values, *shape) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32).view(*shape)


@pytest.mark.parametrize("dtype", DTYPES)
@property_test
@given(
    lengths=st.lists(st.integers(0, 11), min_size=1, max_size=6),
    ranks=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    x_layout=st.sampled_from([*LAYOUTS, "transposed", "expanded"]),
    y_layout=st.sampled_from(LAYOUTS),
    outside=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    seed=st.integers(0, 999),
)
def test_every_segment_has_its_own_update(
    implementation, draw_tensor, rounding, dtype, lengths, ranks, sizes, x_layout, y_layout, outside, seed
):
    generator = torch.Generator().manual_seed(seed)
    num_tokens, (size_in, size_out) = sum(lengths) + sum(outside), sizes
    x = draw_tensor(generator, (num_tokens, size_in), dtype, x_layout)
    y = draw_tensor(generator, (num_tokens, size_out), dtype, y_layout)
    A, B = (draw_tensor(generator, (sum(ranks), size), dtype) for size in sizes)
    ends = torch.tensor(ranks).cumsum(0)
    choice = torch.randint(len(ranks), (len(lengths),), generator=generator, dtype=torch.int32)
    bounds = int32([outside[0] + sum(lengths[:i]) for i in range(len(lengths) + 1)], -1)

    exact, terms = y.double().clone(), y.double().abs()
    for (start, stop), adapter in zip(zip(bounds, bounds[1:], strict=False), choice, strict=True):
        rows = slice(ends[adapter] - ranks[adapter], ends[adapter])
        parts = x[start:stop].double(), A[rows].double(), B[rows].double()
        exact[start:stop] += parts[0] @ parts[1].t() @ parts[2]
        terms[start:stop] += parts[0].abs() @ parts[1].abs().t() @ parts[2].abs()
    arguments = (y, x, A, B, torch.stack([ends - torch.tensor(ranks), ends], 1).int(), bounds, choice)
    if implementation == "reference":
        sgmv_reference(*arguments)
    else:
        assert sgmv_(*arguments) is y
    limit = 1.01 * (size_in + max(ranks) + 2) * U32 * terms + 1.01 * rounding(exact, dtype)
    assert ((y.double() - exact).abs() <= limit).all()


def two_adapters():
    """y, x, A, B, ranks, bounds, choice; the documents are longer than what kernels take at a time."""
    generator = torch.Generator().manual_seed(0)
    y, x, A, B = (torch.randn(shape, generator=generator) for shape in ((301, 600), (301, 65), (24, 65), (24, 600)))
    return y, x, A, B, int32([0, 8, 8, 24], 2, 2), int32([0, 7, 90, 301], -1), int32([0, 1, 0], -1)


def test_many_threads_give_the_same_bits(instruction_set, in_threads):
    y, *others = two_adapters()
    one, two, three = in_threads(lambda: sgmv_(y.clone(), *others))
    assert torch.equal(one, two) and torch.equal(one, three)


def test_other_segments_give_the_same_bits(compiled):
    """A row's result depends on itself and its adapter, not on the batch: alone, and as one of many documents. That of
    the reference does depend on the batch: BLAS sums up one row in another order than many."""
    y, x, A, B, ranks, bounds, choice = two_adapters()
    together = sgmv_(y.clone(), x, A, B, ranks, bounds, choice)
    each = choice.repeat_interleave(bounds.diff())
    assert torch.equal(sgmv_(y.clone(), x, A, B, ranks, int32(list(range(302)), -1), each), together)
    elsewhere = torch.cat([B.new_zeros(1), B.flatten()])[1:].view_as(B)  # not where packs of elements may begin
    assert torch.equal(sgmv_(y.clone(), x, A, elsewhere, ranks, bounds, choice), together)
    for t in (0, 5, 300):
        alone = sgmv_(y[t : t + 1].clone(), x[t : t + 1], A, B, ranks, int32([0, 1], -1), each[t : t + 1])
        assert torch.equal(alone[0], together[t])


def test_float64_is_exact_to_float64():
    torch.manual_seed(0)
    y, x, A, B = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 3), (5, 4), (2, 4), (2, 3)))
    expected = y + x @ A.t() @ B
    sgmv_(y, x, A, B, int32([0, 2], 1, 2), int32([0, 5], -1), int32([0], -1))
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)


def test_what_does_not_fit_is_refused(instruction_set):
    y, x, A, B = torch.ones(4, 3), torch.ones(4, 5), torch.ones(2, 5), torch.ones(2, 3)
    ranks, bounds, choice = int32([0, 2], 1, 2), int32([0, 4], -1), int32([0], -1)
    with pytest.raises(ValueError, match=r"expected \(T, out\), \(T, in\), \(R, in\), \(R, out\)"):
        sgmv_(y, x, A, B.t(), ranks, bounds, choice)
    for arguments, message in [
        ((y, x, A, B, int32([0, 3], 1, 2), bounds, choice), "ranks are beyond the factors"),
        ((y, x, A, B, ranks, int32([0, 5], -1), choice), "bounds are beyond the tokens"),
        ((y, x, A, B, ranks, int32([3, 1], -1), choice), "no such segment"),
        ((y, x, A, B, ranks, bounds, int32([1], -1)), "no such segment"),
        ((y, x, A, B, ranks, bounds, int32([0, 0], -1)), "do not fit"),
        ((y, x.bfloat16(), A, B, ranks, bounds, choice), "one dtype"),
        ((y, x, A, B, ranks.long(), bounds, choice), "int32"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            sgmv_(*arguments)
    assert torch.equal(y, torch.ones(4, 3))


def test_numbers_of_segments_that_are_not_on_the_host_are_refused():
    y, x, A, B, *numbers = two_adapters()
    for index, devices in enumerate(("meta, cpu, cpu", "cpu, meta, cpu", "cpu, cpu, meta")):
        spoilt = [tensor.to("meta") if number == index else tensor for number, tensor in enumerate(numbers)]
        with pytest.raises(ValueError, match=f"ranks, bounds, choice are on {devices}; the host reads them"):
            sgmv_(y, x, A, B, *spoilt)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(instruction_set, dtype):
    arguments = [torch.ones(shape, dtype=dtype) for shape in ((4, 3), (4, 5), (2, 5), (2, 3))]
    numbers = int32([0, 2], 1, 2), int32([0, 4], -1), int32([0], -1)
    torch.library.opcheck(torch.ops.minift.sgmv_.default, (*arguments, *numbers))


def test_kernels_do_not_read_numbers_that_are_not_on_the_host(compiled):
    """Called past the dispatcher, which has other kernels for tensors without memory."""
    op = cuda_on_cpu.op("sgmv_") if compiled == "cuda_on_cpu" else torch.ops.minift.sgmv_.default
    key, device, elsewhere = ("CUDA", "cuda", "cuda") if compiled == "cuda" else ("CPU", "cpu", "meta")
    *rows, ranks, bounds, choice = two_adapters()
    rows = [tensor.to(device) for tensor in rows]
    for spoilt in (
        (ranks.to(elsewhere), bounds, choice),
        (ranks, bounds.to(elsewhere), choice),
        (ranks, bounds, choice.to(elsewhere)),
    ):
        with pytest.raises(RuntimeError, match="must be contiguous int32 on the CPU"):
            op.redispatch(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)), *rows, *spoilt)
