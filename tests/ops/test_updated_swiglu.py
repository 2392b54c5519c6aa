"""SwiGLU with low-rank updates against the formula in fp64.

Tolerances, with u = 2^-23, as tensor cores truncate: a sum of R products and one number is within (R + 2) u of the sum
of their magnitudes. What follows from that for the results is first order, with slopes of silu of at most 1.1 and 0.5;
then comes what test_swiglu.py allows SwiGLU.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minift.ops import updated_swiglu as module
from minift.ops.updated_swiglu import makes_updates

HAS_CPU_KERNELS = False
HAS_CUDA_KERNELS = True
U, U32 = 2.0**-23, 2.0**-24
# The fixtures hold no state between examples.
property_test = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

ranks_of_one = st.lists(st.integers(1, 8).map(lambda eighths: 8 * eighths), max_size=3).filter(
    lambda ranks: sum(-(-rank // 16) for rank in ranks) <= 4
)
FACTOR_LAYOUTS = ["contiguous", "transposed", "misaligned", "misaligned and transposed", "every second column"]


def draw_factor(generator: torch.Generator, width: int, rank: int, layout: str) -> Tensor:
    shape = (rank, width) if "transposed" in layout else (width, rank)
    columns = 2 * shape[1] if layout == "every second column" else shape[1]
    memory = torch.randn(shape[0] * columns + 3, generator=generator).bfloat16()
    matrix = memory[3:] if "misaligned" in layout else memory[:-3]
    matrix = matrix.view(shape[0], columns)[:, :: columns // shape[1]]
    return matrix.t() if "transposed" in layout else matrix


def sum_and_magnitude(matrix: Tensor, narrows: Sequence[Tensor], factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """In fp64: what the matrix is with its updates, and by how much a sum in fp32 may be off."""
    total, magnitude, rank = matrix.double(), matrix.double().abs(), 0
    for narrow, factor in zip(narrows, factors, strict=True):
        total = total + narrow.double() @ factor.double().t()
        magnitude = magnitude + narrow.double().abs() @ factor.double().abs().t()
        rank += factor.shape[1]
    return total, (rank + 2) * U * magnitude


@property_test
@given(
    tokens=st.one_of(st.integers(1, 40), st.sampled_from([127, 128, 129, 300])),
    width=st.integers(1, 45).map(lambda packs: 8 * packs),
    ranks=st.tuples(ranks_of_one, ranks_of_one, ranks_of_one),
    layout=st.sampled_from(FACTOR_LAYOUTS),
    need_y=st.booleans(),
    seed=st.integers(0, 999),
)
@example(tokens=130, width=520, ranks=([16], [16], [16]), layout="contiguous", need_y=True, seed=0)
def test_values_and_gradients_are_the_formula(implementation, rounding, tokens, width, ranks, layout, need_y, seed):
    generator = torch.Generator().manual_seed(seed)
    gate, up, dy = ((2 * torch.randn(tokens, width, generator=generator)).bfloat16() for _ in range(3))
    assert makes_updates(width, ranks, torch.bfloat16, is_on_gpu=True)
    stacked = torch.randn(tokens, sum(map(sum, ranks)), generator=generator).bfloat16()
    flat = [rank for of_one in ranks for rank in of_one]
    narrows = list(stacked.split(flat, dim=1))
    factors = [draw_factor(generator, width, rank, layout) for rank in flat]
    counts = [len(of_one) for of_one in ranks]

    parts = [(n, f) for n, f in zip(narrows, factors, strict=True)]
    of_gate, of_up, of_dy = parts[: counts[0]], parts[counts[0] : sum(counts[:2])], parts[sum(counts[:2]) :]
    (g, g_off), (u, u_off), (d, d_off) = (
        sum_and_magnitude(matrix, [n for n, _ in terms], [f for _, f in terms])
        for matrix, terms in ((gate, of_gate), (up, of_up), (dy, of_dy))
    )
    sigmoid = torch.sigmoid(g)
    silu, slope = g * sigmoid, sigmoid * (1 + g * (1 - sigmoid))
    first = sum(counts[:2])
    if implementation == "reference":
        found_y = module.updated_swiglu_reference(gate, up, narrows[:first], factors[:first], counts[:2])
        dup, again = module.updated_swiglu_backward_reference(dy, gate, up, narrows, factors, counts, need_y)
        dgate = dy
    else:
        found_y = module.updated_swiglu(gate, up, narrows[:first], factors[:first], counts[:2])
        dgate, dup, again = module.updated_swiglu_backward_(dy, gate, up, narrows, factors, counts, need_y)
        assert dgate is dy
    assert torch.equal(again, found_y if need_y else again.new_empty(0))

    def check(found: Tensor, exact: Tensor, off: Tensor) -> None:
        assert found.dtype == torch.bfloat16 and found.shape == exact.shape
        assert ((found.double() - exact).abs() <= 1.01 * (off + rounding(exact.abs() + off, torch.bfloat16))).all()

    check(found_y, silu * u, 1.1 * g_off * u.abs() + silu.abs() * u_off + 7 * U32 * (silu * u).abs())
    check(dup, d * silu, 1.1 * g_off * d.abs() + silu.abs() * d_off + 7 * U32 * (d * silu).abs())
    terms = (d * u).abs() * sigmoid * (1 + g.abs() * (1 - sigmoid))
    off = 0.5 * g_off * (d * u).abs() + 1.1 * (d.abs() * u_off + u.abs() * d_off) + 12 * U32 * terms
    check(dgate, d * u * slope, off)


def test_what_the_kernel_does_not_do_is_refused_or_left_to_others():
    assert not makes_updates(64, [[16]], torch.bfloat16, is_on_gpu=False)
    assert not makes_updates(64, [[16]], torch.float16, is_on_gpu=True)
    assert not makes_updates(65, [[16]], torch.bfloat16, is_on_gpu=True)
    assert not makes_updates(64, [[16], [12]], torch.bfloat16, is_on_gpu=True)
    assert not makes_updates(64, [[16], [64, 8]], torch.bfloat16, is_on_gpu=True)
    assert makes_updates(64, [[16], [32, 24], []], torch.bfloat16, is_on_gpu=True)


def test_the_compiled_kernel_refuses_it(compiled):
    def run(width: int = 16, rank: int = 8, counts: Sequence[int] = (1, 0), factor_width: int | None = None) -> None:
        gate, narrow = torch.zeros(3, width).bfloat16(), torch.zeros(3, rank).bfloat16()
        factor = torch.zeros(width if factor_width is None else factor_width, rank).bfloat16()
        module.updated_swiglu(gate, gate, [narrow], [factor], counts)

    run()
    for arguments, message in (
        ({"width": 15}, "of a width that is a multiple of 8"),
        ({"rank": 12}, "ranks must be multiples of 8"),
        ({"rank": 72}, "too many ranks of one matrix"),
        ({"counts": (1, 1)}, "fewer terms than counted"),
        ({"counts": (0, 0)}, "more terms than counted"),
        ({"counts": (2, -1)}, "fewer terms than counted"),
        ({"counts": (-1, 1)}, "a count is negative"),
        ({"counts": (1,)}, "a count for each matrix"),
        ({"factor_width": 8}, r"factors must be bfloat16 \(width, rank\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(**arguments)
    with pytest.raises(RuntimeError, match=r"must be contiguous bfloat16 \(tokens, width\)"):
        module.updated_swiglu(torch.zeros(16).bfloat16(), torch.zeros(16).bfloat16(), [], [], [0, 0])


def test_opcheck():
    """Of the operations' registration; without a GPU with their references."""
    gate, up, dy = (torch.randn(3, 16).bfloat16() for _ in range(3))
    narrows, factors = [torch.randn(3, 8).bfloat16()] * 2, [torch.randn(16, 8).bfloat16()] * 2
    torch.library.opcheck(torch.ops.minift.updated_swiglu.default, (gate, up, narrows, factors, [1, 1]))
    for need_y in (False, True):
        arguments = (dy, gate, up, narrows, factors, [1, 0, 1], need_y)
        torch.library.opcheck(torch.ops.minift.updated_swiglu_backward_.default, arguments)
