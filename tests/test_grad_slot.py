"""Slots for gradients. Oracle: the sum of what came, by torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import minift.grad_slot
from minift.grad_slot import GradSlot, claim_slot, deliver_product, lay_slot, slot_of
from tests.ranks import DEVICE


@settings(max_examples=60, deadline=None)
@given(
    ways=st.lists(st.sampled_from(["add", "product", "rows", "repeated", "claim"]), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    add_bytes=st.sampled_from([1, 24, 1 << 20]),
    seed=st.integers(0, 999),
)
def test_a_slot_holds_the_sum_of_what_came(ways: list[str], dtype: torch.dtype, add_bytes: int, seed: int) -> None:
    """In any order, a claim finished last; fp64 products into an fp32 slot lose 2⁻²⁴ each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minift.grad_slot, "ADD_BYTES", add_bytes)
        fill_a_slot(ways, dtype, seed)


def fill_a_slot(ways: list[str], dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    slot = GradSlot(torch.full((5, 3), float("nan")))
    total = torch.zeros(5, 3, dtype=torch.float64)
    claimed = None
    for way in ways:
        if way == "add":
            grad = torch.randn(5, 3, dtype=dtype)
            slot.add(grad)
        elif way == "product":
            a, b = torch.randn(5, 4, dtype=dtype), torch.randn(4, 3, dtype=dtype)
            slot.add_product(a, b)
            grad = a.double() @ b.double()
        elif way == "rows":
            rows, values = torch.tensor([4, 1]), torch.randn(2, 3)
            slot.add_rows(rows, values)
            grad = torch.zeros(5, 3, dtype=torch.float64)
            grad[rows] = values.double()
        elif way == "repeated":
            rows, values = torch.tensor([4, 1, 4]), torch.randn(3, 3)
            slot.add_repeated_rows(rows, values)
            grad = torch.zeros(5, 3, dtype=torch.float64).index_add_(0, rows, values.double())
        else:
            memory = slot.claim(torch.float32)
            if memory is None:
                continue
            grad = torch.randn(5, 3)
            memory.copy_(grad)
            claimed = memory
        total += grad.double()
    if claimed is not None:
        slot.finish(claimed)
    assert slot.close()
    assert (slot.tensor - total).abs().max() < 1e-5


NARROW = [torch.bfloat16, torch.float16]


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.integers(0, 6), max_size=60),
    width=st.sampled_from([1, 5, 40]),  # torch has a CUDA kernel for each
    state=st.sampled_from(GradSlot.State),
    dtype=st.sampled_from([torch.float32, *NARROW]),
    values_dtype=st.sampled_from([torch.float32, *NARROW]),
    seed=st.integers(0, 999),
)
def test_repeated_rows_are_summed_in_fp32(rows, width, state, dtype, values_dtype, seed) -> None:
    """Of a row, n values and what was there, the n + 1 addends of which A is the sum of absolute values: n additions in
    fp32, and k roundings to 16 bits with unit roundoff u, which together are off by at most c_n A and c_k A, with
    c_k = k u / (1 - k u), and of fp16 by half the smallest subnormal each.

    k: one for a sum that goes its way in a tensor of 16 bits, one for a slot of 16 bits where that is added.
    """
    goes_by_itself = state is GradSlot.State.CLAIMED or dtype in NARROW
    if goes_by_itself and DEVICE.type == "cpu":
        values_dtype = torch.float32  # in 16 bits that kernel of torch's rounds every sum, on a CPU alone
    generator = torch.Generator().manual_seed(seed)
    rows_N = torch.tensor(rows, dtype=torch.int64)
    values_ND = torch.randn(len(rows), width, generator=generator).to(values_dtype)
    before = torch.randn(7, width, generator=generator).to(dtype)
    slot = GradSlot(torch.full((7, width), float("nan"), dtype=dtype, device=DEVICE))
    if state is GradSlot.State.FULL:
        slot.add(before.to(DEVICE))
    claimed = slot.claim(dtype) if state is GradSlot.State.CLAIMED else None
    slot.add_repeated_rows(rows_N.to(DEVICE), values_ND.to(DEVICE))
    if claimed is not None:
        slot.finish(claimed.copy_(before))
    assert slot.close()

    start = torch.zeros(7, width).double() if state is GradSlot.State.EMPTY else before.double()
    exact = start.index_add(0, rows_N, values_ND.double())
    absolute = start.abs().index_add(0, rows_N, values_ND.double().abs())
    n = torch.bincount(rows_N, minlength=7)[:, None].double()
    narrow = [t for t in (values_dtype if goes_by_itself else None, dtype) if t in NARROW]
    bound = c(n, torch.float32) * absolute
    for narrow_dtype in narrow:
        bound = bound + c(1, narrow_dtype) * (absolute + bound) + 2.0**-25
    assert ((slot.tensor.cpu().double() - exact).abs() <= bound).all()


def c(k: torch.Tensor | int, dtype: torch.dtype) -> torch.Tensor | float:
    """k u / (1 - k u): of k roundings, see Higham 2002, Accuracy and Stability, section 3.1."""
    ku = k * torch.finfo(dtype).eps / 2
    return ku / (1 - ku)


def test_a_frequent_row_loses_nothing() -> None:
    """A running sum of ones in bf16 stops at 256, and 257 is no number of it."""
    wide = GradSlot(torch.empty(2, 40, device=DEVICE))
    ones = torch.ones(257, 40, dtype=torch.bfloat16, device=DEVICE)
    wide.add_repeated_rows(torch.ones(257, dtype=torch.int64, device=DEVICE), ones)
    assert (wide.tensor[1] == 257).all() and (wide.tensor[0] == 0).all()
    narrow = GradSlot(torch.empty(2, 40, dtype=torch.bfloat16, device=DEVICE))
    for _ in range(2):
        ones = torch.ones(1024, 40, device=DEVICE)
        narrow.add_repeated_rows(torch.ones(1024, dtype=torch.int64, device=DEVICE), ones)
    assert (narrow.tensor[1] == 2048).all() and (narrow.tensor[0] == 0).all()


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU: on several threads of a CPU the order is by chance")
def test_repeated_rows_are_added_in_one_order() -> None:
    rows = torch.randint(5, (5000,), device=DEVICE)
    values = torch.randn(5000, 40, device=DEVICE)
    sums = []
    for _ in range(3):
        slot = GradSlot(torch.empty(5, 40, device=DEVICE))
        slot.add_repeated_rows(rows, values)
        sums.append(slot.tensor)
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])


def test_an_unfinished_claim_is_void() -> None:
    slot = GradSlot(torch.empty(2, 2))
    slot.claim(torch.float32).fill_(7.0)
    assert not slot.close()
    assert (slot.tensor == 0).all()
    slot.claim(torch.float32).fill_(7.0)
    slot.add(torch.ones(2, 2))
    assert slot.close()
    assert (slot.tensor == 1).all()


def test_who_may_claim() -> None:
    slot = GradSlot(torch.empty(2, 2))
    assert slot.claim(torch.bfloat16) is None
    first = slot.claim(torch.float32)
    assert first.data_ptr() == slot.tensor.data_ptr() and slot.holds(first)
    assert slot.claim(torch.float32) is None
    slot.finish(first)
    assert slot.claim(torch.float32) is None and not slot.holds(first)
    slot.clear()
    second = slot.claim(torch.float32)
    assert slot.holds(second) and not slot.holds(first), "a forward after clearing has taken the claim over"
    with pytest.raises(AssertionError):
        slot.finish(first)


def test_a_parameter_without_a_slot_gets_its_gradient_from_autograd() -> None:
    parameter = nn.Parameter(torch.empty(2, 3))
    a, b = torch.randn(2, 4), torch.randn(4, 3)
    assert slot_of(parameter) is None and claim_slot(parameter, torch.float32) is None
    assert torch.equal(deliver_product(parameter, a, b), a @ b)
    lay_slot(parameter, GradSlot(torch.empty(2, 3)))
    assert deliver_product(parameter, a, b) is None
    assert torch.equal(slot_of(parameter).tensor, a @ b)
    lay_slot(parameter, None)
    assert slot_of(parameter) is None
