"""Oracles: sizes written down; and PyTorch's own allocator, which also sees what operations allocate inside."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from minift.planner.meter import TensorMeter
from tests.planner.measured import allocated_peak


def test_views_and_what_is_written_in_place_are_not_counted_again() -> None:
    before = torch.ones(100)
    with TensorMeter() as meter:
        a = torch.empty(1000)
        a.view(10, 100)[3].add_(1.0)
        before.mul_(2.0)
        kept = a[:10]
        assert meter.now_bytes == meter.peak_bytes == 4000
        b = a.double()
        assert meter.now_bytes == 12000
        del a
        assert meter.now_bytes == 12000, "a view keeps the whole storage"
        del kept, b
    assert meter.now_bytes == 0 and meter.peak_bytes == 12000


def test_what_autograd_keeps_and_frees() -> None:
    weight = torch.ones(50, 50, requires_grad=True)
    with TensorMeter() as meter:
        hidden = torch.relu(torch.ones(20, 50) @ weight)
        kept = meter.now_bytes
        assert kept >= 2 * 20 * 50 * 4  # the left operand, and relu's result
        hidden.sum().backward()
        assert weight.grad is not None
        del hidden
    assert meter.now_bytes == weight.grad.nbytes and meter.peak_bytes > kept


def test_nothing_is_computed_on_the_meta_device() -> None:
    with TensorMeter() as meter, torch.device("meta"):
        a = torch.empty(1 << 20, 1 << 20)
        (a + a).sum()
    assert meter.peak_bytes == 2 * 4 << 40 or meter.peak_bytes == (2 * 4 << 40) + 4


def test_an_exception_switches_it_off() -> None:
    with pytest.raises(RuntimeError), TensorMeter() as meter:
        torch.ones(2) @ torch.ones(3)
    peak = meter.peak_bytes
    torch.ones(1000)
    assert meter.peak_bytes == peak


def test_it_sees_what_the_allocator_sees() -> None:
    weights = [torch.randn(64, 64, requires_grad=True) for _ in range(4)]

    def step() -> None:
        x = torch.randn(128, 64)
        for weight in weights:
            x = F.gelu(x @ weight)
        x.square().mean().backward()
        for weight in weights:
            weight.grad = None

    step()
    with TensorMeter() as meter:
        step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert meter.peak_bytes == pytest.approx(allocated_peak(profiler), rel=0.01)
