"""Products in blocks of fp32. Oracle: the same product in fp64.

Tolerance. Operands are exact in fp32. A sum of K products in fp32 is off by at most (K + 2) 2^-24 Σ|a||b| (|alpha| and
the addend included), in any order; rounding it to the result's dtype adds 2^-8 (bf16) or 2^-11 (fp16) of itself, or
for fp16 half a step of its subnormals.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minift.ops import matmul
from minift.ops.matmul import addmm_, adds_up_in, linear, mm, widened_bytes
from minift.planner.meter import TensorMeter

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-23, torch.float64: 2.0**-50}
sizes = st.integers(0, 70)


@pytest.fixture(autouse=True, params=["as here", "widened"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On whatever processor this runs, the way of processors that cannot calculate in 16 bits is tested."""
    if request.param == "widened":
        monkeypatch.setattr(matmul, "_cpu_multiplies", lambda dtype: dtype not in (torch.bfloat16, torch.float16))
    monkeypatch.setattr(matmul, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(matmul, "MIN_BLOCK", 8)


def random(rows: int, columns: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    if layout == "transposed":
        return torch.randn(columns, rows).to(dtype).t()
    if layout == "slice":
        return torch.randn(rows, columns + 3).to(dtype)[:, 1 : columns + 1]
    return torch.randn(rows, columns).to(dtype)


def check(ours: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, terms: int) -> None:
    bound = exact.abs() * ROUNDING[ours.dtype] + (terms + 2) * 2.0**-24 * magnitude + 2.0**-25
    worst = (ours.double() - exact).abs() - bound
    assert worst.numel() == 0 or worst.max() <= 0


layouts = st.sampled_from(["contiguous", "transposed", "slice"])


@given(sizes, sizes, sizes, st.sampled_from(list(ROUNDING)), layouts, layouts, layouts, st.integers(0, 2**31))
def test_products(m, k, n, dtype, a_layout, b_layout, out_layout, seed) -> None:
    torch.manual_seed(seed)
    a, b = random(m, k, dtype, a_layout), random(k, n, dtype, b_layout)
    exact, magnitude = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    check(mm(a, b), exact, magnitude, k)
    out = random(m, n, dtype, out_layout)
    assert mm(a, b, out=out) is out
    check(out, exact, magnitude, k)


@given(
    sizes, sizes, sizes, st.sampled_from(list(ROUNDING)), layouts, layouts,
    st.sampled_from([0.0, 1.0, -0.5]), st.sampled_from([1.0, 2.0, -0.3]), st.integers(0, 2**31),
)  # fmt: skip
def test_sums_are_rounded_once(m, k, n, dtype, layout, out_layout, beta, alpha, seed) -> None:
    torch.manual_seed(seed)
    a, b = random(m, k, dtype, layout), random(k, n, dtype, layout)
    out = random(m, n, dtype, out_layout)
    if beta == 0.0:
        out.fill_(torch.nan)  # not read
    before = torch.zeros(m, n).double() if beta == 0.0 else out.double()
    exact = beta * before + alpha * (a.double() @ b.double())
    magnitude = (beta * before).abs() + abs(alpha) * (a.double().abs() @ b.double().abs())
    assert addmm_(out, a, b, beta=beta, alpha=alpha) is out
    check(out, exact, magnitude, k + 2)


def test_what_adds_up_in_what() -> None:
    """16 bits in fp32 on a GPU only."""
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    wider = {
        (total, factors)
        for total in floats
        for factors in floats
        if adds_up_in(total, factors, is_on_gpu=True) and total != factors
    }
    assert wider == {(torch.float32, torch.float16), (torch.float32, torch.bfloat16)}
    for total in floats:
        assert [factors for factors in floats if adds_up_in(total, factors, is_on_gpu=False)] == [total]
        assert adds_up_in(total, total, is_on_gpu=True)


@given(sizes, sizes, sizes, st.sampled_from(list(ROUNDING)), st.booleans(), st.integers(0, 2**31))
def test_linear(n, i, o, dtype, has_bias, seed) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(n, i).to(dtype), torch.randn(o, i).to(dtype)
    bias = torch.randn(o).to(dtype) if has_bias else None
    added = bias.double() if has_bias else torch.zeros(o).double()
    exact = x.double() @ weight.double().t() + added
    check(linear(x, weight, bias), exact, x.double().abs() @ weight.double().abs().t() + added.abs(), i + 1)


@given(m=sizes, k=sizes, n=sizes, dtype=st.sampled_from(list(ROUNDING)), adds=st.booleans())
def test_scratch_memory_is_what_is_said(m: int, k: int, n: int, dtype: torch.dtype, adds: bool) -> None:
    a, b, out = torch.ones(m, k, dtype=dtype), torch.ones(n, k, dtype=dtype).t(), torch.zeros(m, n, dtype=dtype)
    with TensorMeter() as meter:
        addmm_(out, a, b) if adds else mm(a, b, out=out)
    assert meter.peak_bytes == widened_bytes(m, k, n, dtype)
    assert meter.peak_bytes == 0 or dtype in (torch.bfloat16, torch.float16)


def test_a_result_is_one_sum_however_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """K is never cut: a sum that is rounded on the way would lose the ones beside 2^8."""
    a = torch.full((40, 300), 1.0).bfloat16()
    a[:, 0] = 256.0
    b = torch.ones(300, 40).bfloat16()
    assert torch.equal(mm(a, b), torch.full((40, 40), 555.0).bfloat16())
