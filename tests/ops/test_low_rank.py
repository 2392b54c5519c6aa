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
from minift.ops.low_rank import factor_gradients_, from_rank, to_rank, to_rank_and_gradients_

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
    ops = {op.__name__: op for op in (to_rank, from_rank, factor_gradients_, to_rank_and_gradients_)}
    references = {name: getattr(module, f"{name.removesuffix('_')}_reference") for name in ops}
    return references if implementation == "reference" else ops


def shapes_of(widths, ranks, is_shared):
    """(widths of wide matrices, widths of factors, ranks)."""
    of_factors = [widths[0]] * 3 if is_shared else widths
    return widths[:1] if is_shared else widths, of_factors, ranks[: len(of_factors)]


@pytest.fixture
def is_to_rank(implementation, rounding):
    """is_to_rank(narrow, wide, factor, scale): whether it is scale · wide factor."""

    def check(narrow, wide, factor, scale):
        wide, factor = wide.double(), factor.double()
        exact, size = scale * wide @ factor, abs(scale) * wide.abs() @ factor.abs()
        unit = len(factor) * U + 2 * U + (2.0**-8 if implementation == "reference" else 0.0)
        error = (narrow.double() - exact).abs()
        return (error <= unit * size + 1.01 * rounding(exact, torch.bfloat16)).all()

    return check


@pytest.fixture
def is_gradient(implementation, rounding):
    """is_gradient(gradient, wide, narrow): whether it is wideᵀ narrow."""

    def check(gradient, wide, narrow):
        wide, narrow = wide.double(), narrow.double()
        exact, size = wide.t() @ narrow, wide.abs().t() @ narrow.abs()
        rounded_to = torch.bfloat16 if implementation == "reference" else gradient.dtype
        error = (gradient.double() - exact).abs()
        return (error <= (len(wide) + 1) * U * size + 1.01 * rounding(exact, rounded_to)).all()

    return check


@property_test
@given(**CASES, scale=st.sampled_from([1.0, -2.5]))
def test_to_rank(run, draw_tensor, is_to_rank, tokens, sizes, is_shared, layout, scale, seed):
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
        assert is_to_rank(part, wides[0 if is_shared else i], factor, scales[i])


@pytest.mark.parametrize("tokens, width", [(70, 700), (70, 704), (150, 2056), (300, 1031)])
@pytest.mark.parametrize("rank", [8, 24])
def test_to_rank_of_many_columns(implementation, run, rounding, tokens, width, rank):
    """More than are multiplied at once, and parts of the width that are summed up on their own where a GPU would have
    nothing to do otherwise."""
    generator = torch.Generator().manual_seed(0)
    wide, *factors = (torch.randn(s, generator=generator).bfloat16() for s in ((tokens, width), (width, 16)))
    factors.append(torch.randn(rank, width, generator=generator).bfloat16().t())
    narrow = run["to_rank"]([wide], factors, [1.0, -2.5])
    factor = torch.cat([factors[0].double(), -2.5 * factors[1].double()], dim=1)
    exact, size = wide.double() @ factor, wide.double().abs() @ factor.abs()
    unit = (width + 2) * U + (2.0**-8 if implementation == "reference" else 0.0)
    assert ((narrow.double() - exact).abs() <= unit * size + 1.01 * rounding(exact, torch.bfloat16)).all()


@pytest.mark.parametrize("widths", [(700, 300), (704, 296)])
@pytest.mark.parametrize("rank", [16, 72])
def test_from_rank_of_many_columns(run, rounding, widths, rank):
    """More than are made at once, by few tiles of ranks and by many; of both layouts of factors, with and without a
    bias."""
    generator = torch.Generator().manual_seed(rank)
    narrows = [torch.randn(140, rank, generator=generator).bfloat16() for _ in widths]
    factors = [torch.randn(widths[0], rank, generator=generator).bfloat16()]
    factors.append(torch.randn(rank, widths[1], generator=generator).bfloat16().t())
    biases = [torch.randn(widths[0], generator=generator).bfloat16(), torch.empty(0, dtype=torch.bfloat16)]
    wides = run["from_rank"](narrows, factors, [1, 1], biases)
    for wide, narrow, factor, bias in zip(wides, narrows, factors, biases, strict=True):
        bias = bias.double() if bias.numel() else torch.zeros(())
        exact = bias + narrow.double() @ factor.double().t()
        size = bias.abs() + narrow.double().abs() @ factor.double().abs().t()
        assert ((wide.double() - exact).abs() <= (rank + 2) * U * size + 1.01 * rounding(exact, torch.bfloat16)).all()


@property_test
@given(
    **CASES,
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    has_bias=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_from_rank(
    implementation, run, draw_tensor, rounding, tokens, sizes, is_shared, layout, counts, has_bias, seed
):
    generator = torch.Generator().manual_seed(seed)
    widths, ranks = sizes
    counts = [3] if is_shared else counts
    terms = [(i, ranks[term]) for i, count in enumerate(counts) for term in range(count)]
    narrows = [draw_tensor(generator, (tokens, rank), torch.bfloat16, layout) for _, rank in terms]
    factors = [draw_tensor(generator, (widths[i % len(widths)], rank), torch.bfloat16, layout) for i, rank in terms]
    none = torch.empty(0, dtype=torch.bfloat16) if implementation == "reference" else None
    biases = [
        torch.randn(widths[i % len(widths)], generator=generator).bfloat16() if has_bias[i] else none
        for i in range(len(counts))
    ]
    wides = run["from_rank"](narrows, factors, counts, biases)
    assert len(wides) == len(counts)
    for i, wide in enumerate(wides):
        of_wide = [(narrows[t].double(), factors[t].double().t()) for t, (index, _) in enumerate(terms) if index == i]
        bias = biases[i].double() if has_bias[i] else torch.zeros(())
        exact = bias + sum(narrow @ factor for narrow, factor in of_wide)
        size = bias.abs() + sum(narrow.abs() @ factor.abs() for narrow, factor in of_wide)
        assert wide.shape == exact.shape and wide.dtype == torch.bfloat16
        bound = (sum(ranks) + 2) * U * size + 1.01 * rounding(exact, torch.bfloat16)
        assert ((wide.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("counts", [[1, 1], [2], [16, 16], [10, 12], [2] * 20, [2] * 32, [7] * 9], ids=str)
def test_many_terms_and_many_wide_matrices(implementation, run, rounding, counts):
    """More than a kernel takes as its arguments, 48 tiles of ranks, and as many as it does of one wide matrix, 16."""
    generator = torch.Generator().manual_seed(len(counts))
    narrows = [torch.randn(5, 3, generator=generator).bfloat16() for _ in range(sum(counts))]
    factors = [torch.randn(24, 3, generator=generator).bfloat16() for _ in range(sum(counts))]
    none = torch.empty(0, dtype=torch.bfloat16)
    for i, wide in enumerate(run["from_rank"](narrows, factors, counts, [none] * len(counts))):
        of_wide = slice(sum(counts[:i]), sum(counts[: i + 1]))
        pairs = [(n.double(), f.double()) for n, f in zip(narrows[of_wide], factors[of_wide], strict=True)]
        exact, size = (sum(n @ f.t() for n, f in pairs), sum(n.abs() @ f.abs().t() for n, f in pairs))
        bound = (3 * counts[i] + 2) * U * size + 1.01 * rounding(exact, torch.bfloat16)
        assert ((wide.double() - exact).abs() <= bound).all()


@property_test
@given(**CASES, dtype=st.sampled_from([torch.bfloat16, torch.float32]), is_transposed=st.booleans())
def test_factor_gradients(run, draw_tensor, is_gradient, tokens, sizes, is_shared, layout, dtype, is_transposed, seed):
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
        assert is_gradient(gradient, wides[0 if is_shared else i], narrow)


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("tokens", [0, 600, 1100])
@pytest.mark.parametrize("rank", [8, 24])
def test_gradients_of_many_tokens_and_of_none(run, rounding, tokens, is_shared, rank):
    """Sums of parts of the tokens, where a GPU would have nothing to do otherwise."""
    generator = torch.Generator().manual_seed(tokens)
    wides = [torch.randn(tokens, 200, generator=generator).bfloat16() for _ in range(2 - is_shared)]
    narrows = [torch.randn(tokens, rank, generator=generator).bfloat16() for rank in (16, rank)]
    gradients = [torch.full((200, 16), torch.nan), torch.full((rank, 200), torch.nan, dtype=torch.bfloat16).t()]
    run["factor_gradients_"](gradients, wides, narrows)
    for i, (gradient, narrow) in enumerate(zip(gradients, narrows, strict=True)):
        wide = wides[0 if is_shared else i].double()
        exact, size = wide.t() @ narrow.double(), wide.abs().t() @ narrow.double().abs()
        bound = (tokens + 1) * U * size + 1.01 * rounding(exact, torch.bfloat16)
        assert ((gradient.double() - exact).abs() <= bound).all()


def sizes_in_packs():
    """As `sizes_in`, with those ranks with which a GPU reads a wide matrix once for two products."""
    widths = st.lists(st.sampled_from([8, 40, 72, 136, 200]), min_size=1, max_size=3)
    return st.tuples(widths, st.lists(st.sampled_from([8, 16]), min_size=3, max_size=3))


@property_test
@given(
    **CASES | {"sizes": st.one_of(sizes_in(1), sizes_in_packs())},
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float16]),
    is_transposed=st.booleans(),
)
def test_to_rank_and_gradients(
    run, draw_tensor, is_to_rank, is_gradient, tokens, sizes, is_shared, layout, dtype, is_transposed, seed
):
    generator = torch.Generator().manual_seed(seed)
    wide_widths, factor_widths, ranks = shapes_of(*sizes, is_shared)
    wides = [draw_tensor(generator, (tokens, width), torch.bfloat16, layout) for width in wide_widths]
    narrows = [draw_tensor(generator, (tokens, rank), torch.bfloat16, layout) for rank in ranks]
    shapes = list(zip(factor_widths, ranks, strict=True))
    factors = [draw_tensor(generator, shape, torch.bfloat16, layout) for shape in shapes]
    gradients = [
        torch.full((rank, width), torch.nan, dtype=dtype).t() if is_transposed else
        torch.full((width, rank), torch.nan, dtype=dtype)
        for width, rank in shapes
    ]  # fmt: skip
    scales = [-2.5 * (i + 1) for i in range(len(factors))]
    narrow = run["to_rank_and_gradients_"](wides, factors, scales, narrows, gradients)
    assert narrow.shape == (tokens, sum(ranks)) and narrow.dtype == torch.bfloat16
    for i, part in enumerate(narrow.split(ranks, dim=1)):
        wide = wides[0 if is_shared else i]
        assert is_to_rank(part, wide, factors[i], scales[i])
        assert is_gradient(gradients[i], wide, narrows[i])


@pytest.mark.parametrize("tokens, widths", [(0, (24,)), (300, (2056, 1024)), (150, (24, 8, 1032, 16)), (9, (16,) * 60)])
def test_to_rank_and_gradients_in_parts(run, is_to_rank, is_gradient, tokens, widths):
    """Of tokens, of widths, and more wide matrices than a kernel takes as its arguments."""
    generator = torch.Generator().manual_seed(tokens)
    ranks = [(16, 8)[i % 2] for i in range(len(widths))]
    wides = [torch.randn(tokens, width, generator=generator).bfloat16() for width in widths]
    hidden = torch.randn(tokens, sum(ranks), generator=generator).bfloat16()
    shapes = list(zip(widths, ranks, strict=True))
    factors = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    gradients = [torch.full(shape, torch.nan) for shape in shapes]
    narrows, scales = hidden.split(ranks, dim=1), [1.0 + i for i in range(len(widths))]
    narrow = run["to_rank_and_gradients_"](wides, factors, scales, narrows, gradients)
    for i, part in enumerate(narrow.split(ranks, dim=1)):
        assert is_to_rank(part, wides[i], factors[i], scales[i])
        assert is_gradient(gradients[i], wides[i], narrows[i])


def test_many_ranks_of_one_wide_matrix_are_left_to_pytorch_on_a_gpu():
    def of_rank(rank: int) -> torch.Tensor:
        return torch.empty(4, rank, dtype=torch.bfloat16)

    on_gpu = torch.empty(4, 40, dtype=torch.bfloat16, device="meta")
    assert module._is_compiled(on_gpu, [[of_rank(64)], [of_rank(33), of_rank(16)]])
    assert not module._is_compiled(on_gpu, [[of_rank(65)]])
    assert not module._is_compiled(on_gpu, [[of_rank(16)], [of_rank(17), of_rank(17), of_rank(1)]])
    assert module._is_compiled(of_rank(40), [[of_rank(500)]])


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
        gradient.zero_()
        assert (to_rank_and_gradients_([wide], [factor], [1.0], [narrow], [gradient]) == width).all()
        assert (gradient == 9.0).all()
        assert (from_rank([narrow], [factor], [1], [None])[0] == rank).all()


def test_many_threads_give_the_same_bits(instruction_set, in_threads):
    torch.manual_seed(0)
    wides = [torch.randn(301, width).bfloat16() for width in (600, 210)]
    factors = [torch.randn(width, 16).bfloat16() for width in (600, 210)]

    def everything() -> list[torch.Tensor]:
        narrow = to_rank(wides, factors, [1.0, 2.0])
        narrows = narrow.split(16, dim=1)
        totals = from_rank(narrows, factors, [1, 1], [None, factors[1][:, 0]])
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
    narrow = torch.ones(4, 2).bfloat16()
    for counts in ([2], [1, 1], [1, 0], []):
        with pytest.raises(ValueError, match="1 narrow matrices, 1 factors, . biases, and wide matrices of"):
            from_rank([narrow], [factor], counts, [None] * len(counts))
    for narrows, factors in (([torch.ones(4, 3).bfloat16()], [factor]), ([narrow] * 2, [factor, factor[:5]])):
        with pytest.raises(RuntimeError):
            from_rank(narrows, factors, [len(factors)], [None])
    with pytest.raises(RuntimeError):
        factor_gradients_([torch.ones(2, 6)], [wide], [torch.ones(4, 2).bfloat16()])
    with pytest.raises(RuntimeError):
        to_rank_and_gradients_([wide], [factor], [1.0], [torch.ones(4, 3).bfloat16()], [torch.ones(6, 3)])
    with pytest.raises(RuntimeError):
        to_rank_and_gradients_([wide] * 2, [factor] * 2, [1.0], [narrow] * 2, [torch.ones(6, 2)] * 2)


def test_opcheck(instruction_set):
    wide, narrow, factor = (torch.randn(shape).bfloat16() for shape in ((5, 20), (5, 3), (20, 3)))
    ops = torch.ops.minift
    torch.library.opcheck(ops.to_rank.default, ([wide], [factor], [2.0]))
    torch.library.opcheck(
        ops.from_rank.default, ([narrow] * 3, [factor, factor, factor[:7]], [2, 1], [factor[:, 0], factor.new_empty(0)])
    )
    torch.library.opcheck(ops.factor_gradients_.default, ([factor.float()], [wide], [narrow]))
    torch.library.opcheck(ops.to_rank_and_gradients_.default, ([wide], [factor], [2.0], [narrow], [factor.float()]))
