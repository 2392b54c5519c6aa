"""Slots for gradients. Oracle: the sum of what came, by torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import minift.grad_slot
from minift.grad_slot import GradSlot, claim_slot, deliver_product, lay_slot, slot_of


@settings(max_examples=60, deadline=None)
@given(
    ways=st.lists(st.sampled_from(["add", "product", "rows", "claim"]), min_size=1, max_size=4),
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
