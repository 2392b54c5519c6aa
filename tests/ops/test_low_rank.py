"""Products with a narrow side against fp64.

Tolerances: products of two bf16 are exact in fp32; a sum of n of them, in any order, loses n 2^-24 of the sum of their
magnitudes, and so does a scale or what it is added to. The result's rounding is what conftest.py's `rounding` says. The
reference rounds factors once more where they are scaled, by 2^-8.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minift.ops import low_rank as module
from minift.ops.low_rank import add_from_rank_, factor_gradients_, to_rank

HAS_CUDA_KERNELS = True
U = 2.0**-24
# The fixtures hold no state between examples.
property_test = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def sizes_in(unit):
    """Up to three widths and three ranks, multiples of `unit`: of eight, so that kernels can take eight at a time."""
    of_unit = [st.integers(1, largest // unit).map(lambda count: unit * count) for largest in (150, 40)]
    return st.tuples(st.lists(of_unit[0], min_size=1, max_size=3), st.lists(of_unit[1], min_size=3, max_size=3))


CASES = {
    "tokens": st.integers(1, 150),
    "sizes": st.one_of(sizes_in(1), sizes_in(8)),
    "is_shared": st.booleans(),
    "layout": st.sampled_from(["contiguous", "slice of wider rows", "transposed"]),
    "seed": st.integers(0, 999),
}


@pytest.fixture
def run(implementation):
    """run(name): the op, or its reference."""
    ops = {"to_rank": to_rank, "add_from_rank_": add_from_rank_, "factor_gradients_": factor_gradients_}
    references = {name: getattr(module, f"{name.removesuffix('_')}_reference") for name in ops}
    return references if implementation == "reference" else ops


def shapes_of(widths, ranks, is_shared):
    """(widths of wide matrices, widths of factors, ranks)."""
    of_factors = [widths[0]] * 3 if is_shared else widths
    return widths[:1] if is_shared else widths, of_factors, ranks[: len(of_factors)]


@property_test
@given(**CASES, scale=st.sampled_from([1.0, -2.5]))
def test_to_rank(implementation, run, draw_tensor, rounding, tokens, sizes, is_shared, layout, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    wide_widths, factor_widths, ranks = shapes_of(*sizes, is_shared)
    wides = [draw_tensor(generator, (tokens, width), torch.bfloat16, layout) for width in wide_widths]
    factors = [
        draw_tensor(generator, (width, rank), torch.bfloat16, layout)
        for width, rank in zip(factor_widths, ranks, strict=True)
    ]
    scales = [scale * (i + 1) for i in range(len(factors))]
    narrow = run["to_rank"](wides, factors, scales)
    assert narrow.shape == (tokens, sum(ranks)) and narrow.dtype == torch.bfloat16
    for i, (part, factor) in enumerate(zip(narrow.split(ranks, dim=1), factors, strict=True)):
        wide = wides[0 if is_shared else i].double()
        exact, size = scales[i] * wide @ factor.double(), abs(scales[i]) * wide.abs() @ factor.double().abs()
        unit = len(factor) * U + 2 * U + (2.0**-8 if implementation == "reference" else 0.0)
        assert ((part.double() - exact).abs() <= unit * size + 1.01 * rounding(exact, torch.bfloat16)).all()


def test_to_rank_of_few_tokens_and_many_columns(implementation, run, rounding):
    """Parts of the width are summed up on their own where a GPU would have nothing to do otherwise."""
    generator = torch.Generator().manual_seed(0)
    wide, *factors = (torch.randn(s, generator=generator).bfloat16() for s in ((70, 700), (700, 16), (700, 24)))
    narrow = run["to_rank"]([wide], factors, [1.0, -2.5])
    factor = torch.cat([factors[0].double(), -2.5 * factors[1].double()], dim=1)
    exact, size = wide.double() @ factor, wide.double().abs() @ factor.abs()
    unit = 702 * U + (2.0**-8 if implementation == "reference" else 0.0)
    assert ((narrow.double() - exact).abs() <= unit * size + 1.01 * rounding(exact, torch.bfloat16)).all()


@property_test
@given(**CASES)
def test_add_from_rank(run, draw_tensor, rounding, tokens, sizes, is_shared, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    wide_widths, factor_widths, ranks = shapes_of(*sizes, is_shared)
    row_layout = "contiguous" if layout == "transposed" else layout
    wides = [draw_tensor(generator, (tokens, width), torch.bfloat16, row_layout) for width in wide_widths]
    narrows = [draw_tensor(generator, (tokens, rank), torch.bfloat16, layout) for rank in ranks]
    factors = [
        draw_tensor(generator, (width, rank), torch.bfloat16, layout)
        for width, rank in zip(factor_widths, ranks, strict=True)
    ]
    exact, size = [wide.double() for wide in wides], [wide.double().abs() for wide in wides]
    for i, (narrow, factor) in enumerate(zip(narrows, factors, strict=True)):
        exact[0 if is_shared else i] += narrow.double() @ factor.double().t()
        size[0 if is_shared else i] += narrow.double().abs() @ factor.double().abs().t()
    run["add_from_rank_"](wides, narrows, factors)
    for wide, wanted, terms in zip(wides, exact, size, strict=True):
        bound = (sum(ranks) + 2) * U * terms + 1.01 * rounding(wanted, torch.bfloat16)
        assert ((wide.double() - wanted).abs() <= bound).all()


@property_test
@given(**CASES, dtype=st.sampled_from([torch.bfloat16, torch.float32]), is_transposed=st.booleans())
def test_factor_gradients(
    implementation, run, draw_tensor, rounding, tokens, sizes, is_shared, layout, dtype, is_transposed, seed
):
    generator = torch.Generator().manual_seed(seed)
    wide_widths, factor_widths, ranks = shapes_of(*sizes, is_shared)
    wides = [draw_tensor(generator, (tokens, width), torch.bfloat16, layout) for width in wide_widths]
    narrows = [draw_tensor(generator, (tokens, rank), torch.bfloat16, layout) for rank in ranks]
    gradients = [
        torch.full((rank, width), torch.nan, dtype=dtype).t() if is_transposed else
        torch.full((width, rank), torch.nan, dtype=dtype)
        for width, rank in zip(factor_widths, ranks, strict=True)
    ]  # fmt: skip
    run["factor_gradients_"](gradients, wides, narrows)
    for i, (gradient, narrow) in enumerate(zip(gradients, narrows, strict=True)):
        wide = wides[0 if is_shared else i].double()
        exact, size = wide.t() @ narrow.double(), wide.abs().t() @ narrow.double().abs()
        rounded_to = torch.bfloat16 if implementation == "reference" else dtype
        bound = (tokens + 1) * U * size + 1.01 * rounding(exact, rounded_to)
        assert ((gradient.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("tokens", [0, 600, 1100])
def test_gradients_of_many_tokens_and_of_none(run, rounding, tokens, is_shared):
    """Sums of parts of the tokens, where a GPU would have nothing to do otherwise."""
    generator = torch.Generator().manual_seed(tokens)
    wides = [torch.randn(tokens, 200, generator=generator).bfloat16() for _ in range(2 - is_shared)]
    narrows = [torch.randn(tokens, rank, generator=generator).bfloat16() for rank in (16, 24)]
    gradients = [torch.full((200, 16), torch.nan), torch.full((24, 200), torch.nan, dtype=torch.bfloat16).t()]
    run["factor_gradients_"](gradients, wides, narrows)
    for i, (gradient, narrow) in enumerate(zip(gradients, narrows, strict=True)):
        wide = wides[0 if is_shared else i].double()
        exact, size = wide.t() @ narrow.double(), wide.abs().t() @ narrow.double().abs()
        bound = (tokens + 1) * U * size + 1.01 * rounding(exact, torch.bfloat16)
        assert ((gradient.double() - exact).abs() <= bound).all()


def test_many_ranks_of_one_wide_matrix_are_left_to_pytorch_on_a_gpu():
    wide, factor = (torch.empty(4, 40, dtype=torch.bfloat16, device=device) for device in ("meta", "cpu"))
    assert module._is_compiled([wide], [factor]) and module._is_compiled([wide, wide], [factor, factor])
    assert not module._is_compiled([wide], [factor, factor]) and module._is_compiled([factor], [factor, factor])


@pytest.mark.parametrize("width, rank", [(33, 5), (32, 6), (32, 8)])
def test_neighbours_in_memory_are_not_read(implementation, width, rank):
    """Elements go in pairs; where their number is odd, the last one's partner belongs to somebody else."""
    wide = torch.full((9, width + 1), torch.nan, dtype=torch.bfloat16)[:, :width].fill_(1.0)
    narrow = torch.full((9, rank + 1), torch.nan, dtype=torch.bfloat16)[:, :rank].fill_(1.0)
    for factor in (torch.ones(width, rank).bfloat16(), torch.ones(rank, width).bfloat16().t()):
        assert (to_rank([wide], [factor], [1.0]) == width).all()
        gradient = torch.empty_like(factor)
        factor_gradients_([gradient], [wide], [narrow])
        assert (gradient == 9.0).all()
        total = wide.clone()
        add_from_rank_([total], [narrow], [factor])
        assert (total == 1.0 + rank).all()


def test_many_threads_give_the_same_bits(instruction_set, in_threads):
    torch.manual_seed(0)
    wides = [torch.randn(301, width).bfloat16() for width in (600, 210)]
    factors = [torch.randn(width, 16).bfloat16() for width in (600, 210)]

    def everything() -> list[torch.Tensor]:
        narrow = to_rank(wides, factors, [1.0, 2.0])
        narrows, totals = narrow.split(16, dim=1), [wide.clone() for wide in wides]
        add_from_rank_(totals, narrows, factors)
        gradients = [torch.empty(factor.shape) for factor in factors]
        factor_gradients_(gradients, wides, narrows)
        return [narrow, *totals, *gradients]

    one, two, three = in_threads(everything)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, three, strict=True))


def test_other_dtypes_and_factors_in_fp32():
    wide, factor = torch.randn(5, 7, dtype=torch.float64), torch.randn(7, 3)
    torch.testing.assert_close(to_rank([wide], [factor], [0.5]), 0.5 * wide @ factor.double())
    narrow = to_rank([wide.bfloat16()], [factor], [0.5])
    assert torch.equal(narrow, to_rank([wide.bfloat16()], [factor.bfloat16()], [0.5]))


def test_wrong_counts_and_shapes_are_refused():
    wide, factor = torch.ones(4, 6).bfloat16(), torch.ones(6, 2).bfloat16()
    with pytest.raises(ValueError, match="to_rank: 2 wide matrices for 3 factors"):
        to_rank([wide, wide], [factor] * 3, [1.0] * 3)
    with pytest.raises(RuntimeError):
        to_rank([wide], [factor.t()], [1.0])
    with pytest.raises(RuntimeError):
        add_from_rank_([wide], [torch.ones(4, 3).bfloat16()], [factor])
    with pytest.raises(RuntimeError):
        factor_gradients_([torch.ones(2, 6)], [wide], [torch.ones(4, 2).bfloat16()])


def test_opcheck(instruction_set):
    wide, narrow, factor = (torch.randn(shape).bfloat16() for shape in ((5, 20), (5, 3), (20, 3)))
    ops = torch.ops.minift
    torch.library.opcheck(ops.to_rank.default, ([wide], [factor], [2.0]))
    torch.library.opcheck(ops.add_from_rank_.default, ([wide], [narrow], [factor]))
    torch.library.opcheck(ops.factor_gradients_.default, ([factor.float()], [wide], [narrow]))
